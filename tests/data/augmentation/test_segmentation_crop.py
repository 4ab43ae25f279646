import colorsys

import numpy as np
import pytest
import torch

from maskwise.data.augmentation.segmentation_crop import SegmentationCrop, aspect_size, distort


def position_images(height=90, width=120):
    """Colors and labels that tell where a pixel comes from."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([2 * y, 2 * x, torch.zeros_like(x)]).to(torch.uint8), (y // 45) * 2 + x // 60


def test_sizes_keep_the_aspect():
    assert aspect_size((600, 800), 512) == (512, 683) and aspect_size((100, 1000), 512) == (205, 2048)


def test_image_and_labels_are_cut_alike():
    image, labels = position_images()
    crop = SegmentationCrop(64, seed=3)
    for index in range(12):
        u_image, u_labels = crop(image, labels, index)
        assert u_image.shape[-2:] == u_labels.shape and max(u_labels.shape) <= 64
        assert u_image.dtype == torch.uint8 and set(u_labels.unique().tolist()) <= {0, 1, 2, 3}
    crop = SegmentationCrop(90, augment=False)  # the center, at the size of the image
    center, its_labels = crop(image, labels, 0)
    assert torch.equal(center, image[:, :, 15:105]) and torch.equal(its_labels, labels[:, 15:105])


def test_labels_follow_the_colors(monkeypatch):
    """Without color distortion the label of a pixel is that of the place its color names."""
    monkeypatch.setattr("maskwise.data.augmentation.segmentation_crop.distort", lambda image, u: image)
    image, labels = position_images()
    flipped = 0
    for index in range(10):
        cut, its_labels = SegmentationCrop(48, seed=1, epoch=index)(image, labels, index)
        y, x = cut[0].float() / 2, cut[1].float() / 2
        sure = ((y - 44.5).abs() > 2) & ((x - 59.5).abs() > 2)
        expected = (y > 44.5).long() * 2 + (x > 59.5).long()
        assert torch.equal(its_labels[sure], expected[sure])
        flipped += bool(x[0, 0] > x[0, -1])
    assert 0 < flipped < 10


def test_draws_are_keyed():
    image, labels = position_images()
    first, again, other = (SegmentationCrop(48, seed=s, epoch=2)(image, labels, 7) for s in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_crops_of_one_class_are_drawn_again():
    image, labels = torch.zeros(3, 400, 400, dtype=torch.uint8), torch.zeros(400, 400, dtype=torch.int64)
    labels[:, 300:] = 1
    shares = []
    for index in range(40):
        _, cut = SegmentationCrop(100, seed=0)(image, labels, index)
        shares.append(float(torch.bincount(cut.flatten()).max() / cut.numel()))
    blind = []
    for index in range(40):
        _, cut = SegmentationCrop(100, seed=0, most=2.0)(image, labels, index)
        blind.append(float(torch.bincount(cut.flatten()).max() / cut.numel()))
    assert sum(share < 0.75 for share in shares) > 1.5 * sum(share < 0.75 for share in blind)
    crop = SegmentationCrop(4)
    assert not crop.varied(torch.tensor([[1, 1], [255, 255]])) and crop.varied(torch.tensor([[1, 2], [255, 255]]))
    assert not crop.varied(torch.tensor([[1, 1], [1, 2]]))  # 75 %


def test_distortions_by_hand():
    off = [1.0, 0.5, 1.0, 0.5, 0.0, 1.0, 0.5, 1.0, 0.5]
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 2)
    assert torch.equal(distort(image, off), image)
    assert distort(image, [0.0, 1.0, *off[2:]])[:, 0, 0].tolist() == [232, 132, 82]
    assert distort(image, [*off[:2], 0.0, 1.0, *off[4:]])[:, 0, 0].tolist() == [255, 150, 75]
    both = distort(image, [0.0, 1.0, 0.0, 0.0, 0.9, *off[5:]])  # contrast after brightness
    assert both[:, 0, 0].tolist() == [116, 66, 41]
    turned = distort(image, [*off[:7], 0.0, 1.0])[:, 0, 0].tolist()  # hue by 36 degrees
    hue, saturation, value = colorsys.rgb_to_hsv(200 / 255, 100 / 255, 50 / 255)
    expected = 255 * np.array(colorsys.hsv_to_rgb(hue + 0.1, saturation, value))
    assert turned == pytest.approx(expected.tolist(), abs=4)
    pale = distort(image, [*off[:5], 0.0, 0.0, *off[7:]])[:, 0, 0].tolist()  # half the saturation
    assert pale == pytest.approx((255 * np.array(colorsys.hsv_to_rgb(hue, saturation / 2, value))).tolist(), abs=4)

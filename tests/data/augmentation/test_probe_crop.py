"""The crop and flip of linear probes, against torchvision's rule and torch's resize."""

import torch
import torch.nn.functional as F

from maskwise.data.augmentation.probe_crop import CropAndFlip


def test_crop_is_a_function_of_seed_epoch_and_sample():
    image = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    views = [
        CropAndFlip((16, 16), seed=s, epoch=e)(image, i)
        for s, e, i in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))
    ]
    assert all(view.shape == (3, 16, 16) and view.dtype == torch.uint8 for view in views)
    assert torch.equal(views[0], views[4]) and not any(torch.equal(views[0], view) for view in views[1:4])


def test_pixels_equal_the_resized_box():
    image = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flips = set()
    for i in range(12):
        crop = CropAndFlip((8, 12))
        (top, left, height, width), flipped = crop.box(40, 30, i)
        part = F.interpolate(
            image[None, :, top : top + height, left : left + width].double(),
            size=(8, 12),
            mode="bilinear",
            antialias=True,
        )[0]
        view = crop(image, i).double()
        assert (view - (part.flip(-1) if flipped else part)).abs().max() <= 1
        flips.add(flipped)
    assert flips == {True, False}


def test_boxes_are_distributed_as_in_torchvision():
    """Check the means of 2,000 boxes: area uniform in .08..1 of the image, aspect log-uniform."""
    boxes = torch.tensor([CropAndFlip((8, 8)).box(512, 512, i)[0] for i in range(2000)], dtype=torch.float64)
    share, aspect = boxes[:, 2] * boxes[:, 3] / 512**2, boxes[:, 3] / boxes[:, 2]
    # Boxes that do not fit are drawn again, so the mean is below .54.
    assert share.min() > 0.07 and share.max() <= 1 and abs(share.mean() - 0.50) < 0.03
    assert abs(aspect.log().mean()) < 0.02 and aspect.min() > 0.74 and aspect.max() < 1.35


def test_sixteen_bits_and_any_channels():
    image = torch.randint(0, 256, (5, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crop = CropAndFlip((8, 12), seed=3)
    eight, sixteen = crop(image, 4), crop((image.to(torch.int32) * 257).to(torch.uint16), 4)
    assert sixteen.dtype == torch.uint16 and sixteen.shape == (5, 8, 12)
    assert (sixteen.to(torch.int32) / 257 - eight.to(torch.int32)).abs().max() <= 1.01

"""Antialiased bicubic resizing against Pillow's, center crops against torchvision's and timm's."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import functional

from maskwise.imaging import resize


def test_resize_matches_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for size in ((16, 24), (80, 50), (40, 60)):
        expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        resized = resize.resize_image(torch.from_numpy(pixels).permute(2, 0, 1), size)
        assert resized.dtype == torch.uint8
        assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_short_side():
    assert resize.short_side((375, 500), 256) == (256, 341)
    assert resize.short_side((500, 375), 256) == (341, 256)
    assert resize.short_side((32, 32), 32) == (32, 32)


@pytest.mark.parametrize("size, target", [((1000, 100), (370, 37)), ((300, 40), (90, 30)), ((60, 50), (40, 45))])
def test_tall_images_are_resized_columns_first_as_in_pillow(size, target):
    pixels = (np.random.default_rng(0).integers(0, 2, (*size, 3)) * 255).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC)).astype(int)
    resized = resize.resize_image(torch.from_numpy(pixels).permute(2, 0, 1), target)
    assert resize.is_vertical_first(size, target)
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_center_crops_are_those_of_torchvision():
    image = torch.arange(3 * 45 * 47).reshape(3, 45, 47)
    for height, width in itertools.product(range(36, 46), range(36, 48)):
        expected = functional.center_crop(image, [height, width])
        assert torch.equal(resize.center_crop(image, (height, width)), expected), (height, width)


def test_oblong_targets_are_covered_as_in_timm():
    assert resize.covering((100, 100), (36, 54)) == (54, 54)
    assert resize.covering((200, 280), (36, 54)) == (39, 54)
    keep_ratio = ResizeKeepRatio((36, 54))
    for size in ((37, 53), (280, 200), (20, 90), (90, 20), (333, 500), (36, 54)):
        resized = keep_ratio(Image.new("RGB", size[::-1]))
        assert resize.covering(size, (36, 54)) == (resized.height, resized.width)

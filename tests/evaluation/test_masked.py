"""Masked accuracy with planted attention: the guide decides which patches become black."""

import pytest
import torch

from maskwise.evaluation.masked import masked
from maskwise.nn.tokens import Features
from support.planted import Pictures, Plain, gray


class Colors(Plain):
    """An encoder whose vector is the mean color, and whose attention is on one half of a 1 x 2 grid."""

    def __init__(self, left):
        super().__init__(3)
        self.pooling, self.left = type("OneQuery", (), {"k": 1}), left

    def forward(self, images, **requests):
        vectors = images.mean(dim=(2, 3))
        attention = torch.tensor([0.9, 0.1] if self.left else [0.1, 0.9]).expand(len(images), 1, 2)
        return Features(vectors, images.unflatten(3, (2, 4)).mean(dim=(2, 4)).transpose(1, 2), attention, (1, 2))


def halves(label):
    """Return an image of which only the left half differs between the classes."""
    image = gray(50)
    image[:, :, :4] = 0
    image[label, :, :4] = 200
    return image


@pytest.fixture
def data():
    train = Pictures([halves(0), halves(1)], [0, 1], ["red", "green"])
    return {"train": train, "test": Pictures([halves(i % 2) for i in range(6)], [0, 1] * 3, ["red", "green"])}


def test_the_guides_attention_ranks_the_patches(data):
    options = {"ratios": 0.5, "modes": ("high", "low")}
    own = masked(Colors(left=False), data, **options).numbers
    assert own == {"top1": 100, "high_0.5_top1": 100, "high_0.5_drop": 0, "low_0.5_top1": 50, "low_0.5_drop": 50}
    guided = masked(Colors(left=False), data, guide=Colors(left=True), **options).numbers
    assert guided == {"top1": 100, "high_0.5_top1": 50, "high_0.5_drop": 50, "low_0.5_top1": 100, "low_0.5_drop": 0}


class Strided(Colors):
    """A guide for images of 16 pixels with 2 x 2 patches, which attends to bright ones."""

    image_size = (16, 16)

    def forward(self, images, **requests):
        height, width = (side // 8 for side in images.shape[-2:])
        brightness = images.mean(dim=1).unflatten(2, (width, 8)).unflatten(1, (height, 8)).mean(dim=(2, 4)).flatten(1)
        return Features(images.mean(dim=(2, 3)), None, brightness[:, None], (height, width))


def test_a_guide_of_larger_images_sees_them_at_its_own_size(data):
    """The left half, by which classes differ, is the brighter one; at 8 pixels the guide would have one patch alone."""
    numbers = masked(Colors(left=False), data, guide=Strided(left=False), ratios=0.5, modes=("high", "low")).numbers
    assert (numbers["high_0.5_top1"], numbers["low_0.5_top1"]) == (50, 100)


def test_all_patches_of_a_ratio_of_1_are_black(data):
    assert masked(Colors(left=False), data, ratios=1.0, modes="random").numbers["random_1_top1"] == 50

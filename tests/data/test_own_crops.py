"""Crops by a transform of the user: layout, keyed randomness, colors left alone, one line for mistakes."""

import random

import numpy
import pytest
import torch
from torchvision.transforms import functional as transforms

from maskwise.data.augmentation import color
from maskwise.data.own_crops import OwnCrops, title
from maskwise.errors import UserError
from support.figures import Noise, crops

SIZES = {"global_size": 16, "local_size": 8, "local_number": 2}
IMAGES = [Noise(4)[index][0] for index in range(4)]


def test_crops_lie_crop_major_and_do_not_depend_on_the_split():
    own = OwnCrops(crops, seed=3, **SIZES)
    global_crops, local_crops, params = own.batch(IMAGES, [7, 2, 9, 4], 1)
    assert global_crops.shape == (8, 3, 16, 16) and local_crops.shape == (8, 3, 8, 8)
    for place, sample in ((2, 9), (3, 4)):
        alone = own.crops(IMAGES[place], sample, 1)
        together = [global_crops[place], global_crops[4 + place], local_crops[place], local_crops[4 + place]]
        assert all(torch.equal(one, other) for one, other in zip(alone, together))
    half = own.batch(IMAGES[2:], [9, 4], 1)
    assert torch.equal(half[0], global_crops[[2, 3, 6, 7]]) and torch.equal(half[1], local_crops[[2, 3, 6, 7]])
    for other in (own.batch(IMAGES, [7, 2, 9, 4], 2), OwnCrops(crops, seed=4, **SIZES).batch(IMAGES, [7, 2, 9, 4], 1)):
        assert not torch.equal(other[0], global_crops)
    assert not torch.equal(own.crops(IMAGES[0], 5, 1)[0], own.crops(IMAGES[0], 6, 1)[0])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = transforms.normalize(global_crops / 255, mean, std)
    assert torch.allclose(color.augment(global_crops, params.global_, mean, std), expected, atol=1e-5)


def test_python_numpy_and_torch_are_seeded():
    seen = []

    def transform(image):
        seen.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
        return [image.resize((16, 16))] * 2 + [image.resize((8, 8))] * 2

    own = OwnCrops(transform, **SIZES)
    for sample in (0, 0, 1):
        own.crops(IMAGES[0], sample, 0)
    assert seen[0] == seen[1] and all(one != other for one, other in zip(seen[1], seen[2]))


def test_every_kind_of_crop():
    kinds = {
        "pil": lambda image: image,
        "array": numpy.asarray,
        "uint8": transforms.pil_to_tensor,
        "float": transforms.to_tensor,
    }
    sizes = (16, 16, 8, 8)
    results = [
        OwnCrops(lambda image, kind=kind: [kind(image.resize((s, s))) for s in sizes], **SIZES).crops(IMAGES[0], 0, 0)
        for kind in kinds.values()
    ]
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result))


def fails(image):
    raise ValueError("a bad\nday")


@pytest.mark.parametrize(
    "transform, line",
    [
        (lambda image: image, "transform returned a Image; the recipe takes 2 global crops of 16 x 16 px and 2 local"),
        (lambda image: [image] * 3, "transform returned 3 crops; the recipe takes 2 global"),
        (lambda image: crops(image)[::-1], "transform, crop 0 is 8 x 8 px; the recipe takes"),
        (lambda image: [torch.randn(3, 16, 16)] * 4, "transform, crop 0: a float image holds values in 0..1"),
        (lambda image: ["a"] * 4, "transform, crop 0: an image is a PIL image"),
        (fails, "transform raised ValueError: a bad day"),
    ],
)
def test_mistakes_are_one_line(transform, line):
    with pytest.raises(UserError) as caught:
        OwnCrops(transform, **SIZES).batch(IMAGES, range(4), 0)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_titles():
    assert (title(None), title(crops), title(OwnCrops(crops))) == (None, "crops", "OwnCrops")

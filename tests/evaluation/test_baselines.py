"""Baselines on images whose pixels differ mostly by a nuisance, so that raw pixels fail and whitened ones do not."""

import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation import baselines as module
from maskwise.evaluation.baselines import baselines, line, rows, table
from maskwise.evaluation.features.whitened_pixels import WhitenedPixels, fit_whitening
from maskwise.evaluation.knn import knn
from support.planted import Lookup, Pictures

COUNT = 32  # places on the circle


def picture(place, label):
    """A picture [3, 8, 8]: a pattern of angle 2 pi place / 32 and amplitude 80, and one of amplitude +-4 by class."""
    across, down = torch.ones(8, 8), torch.ones(8, 8)
    across[:, 4:], down[4:] = -1, -1
    angle = 2 * math.pi * place / COUNT
    image = 128 + 80 * math.cos(angle) * across + 80 * math.sin(angle) * across * down + (4 - 8 * label) * down
    return image.round().to(torch.uint8).expand(3, 8, 8)


def planted():
    """Training images of alternating classes around the circle, and test images of the other class at each place.

    The nearest training pixels are those of the same place, 8 away, hence of the wrong class; the next place is 16
    away. Whitened, place and class have one scale: cosines of 1/3 at the same place, .99 for the class at the next.
    """
    train = [(place, place % 2) for place in range(COUNT)]
    test = [(place, 1 - label) for place, label in train]
    return {
        role: Pictures([picture(*each) for each in part], [label for _, label in part], ["a", "b"])
        for role, part in (("train", train), ("test", test))
    }


def test_raw_pixels_are_wrong_and_whitened_ones_right():
    report = baselines(planted(), k=1, size=8)
    assert report.numbers == {"pixels_top1_k1": 0.0, "whitened_pixels_top1_k1": 100.0, "chance": 50.0}
    assert report.protocol["whitened_pixels"] == {"size": 8, "dims": 3, "fitted_to": 32}
    assert report.protocol["pixels"] == 8 and report.protocol["evaluation"] == "baselines"
    assert report.cost["images"] == 64


def test_an_untrained_network_has_its_rows():
    report = baselines(planted(), untrained=Lookup(torch.ones(256, 2)), k=(1, 32))
    # All training images are equally near: the votes of all 32 are 16 to 16, which the first class wins.
    assert report.numbers["untrained_pooled_top1_k32"] == 50.0
    assert report.protocol["pixels"] == 8  # the encoder's image size
    assert rows(report, 32)["untrained network"] == 50.0
    assert (rows(report, 1)["raw pixels"], rows(report, 1)["whitened pixels"]) == (0.0, 100.0)
    assert "  untrained network                50.0" in table(report) and "3 dimensions" in table(report)
    assert line(report).startswith("k-NN baselines (k = 1): untrained network 50.0  raw pixels 0.0")


def test_the_fit_sees_the_training_images_only():
    data = planted()
    alone = knn(WhitenedPixels(8), data, feature=(), k=1, whitened_pixels=8).numbers
    data["test"] = Pictures([*data["test"].images, *[picture(0, 0)] * 400], [*data["test"].labels.tolist(), *[0] * 400])
    more = knn(WhitenedPixels(8), data, feature=(), k=1, whitened_pixels=8)
    assert alone["whitened_pixels_top1_k1"] == 100.0
    assert more.protocol["whitened_pixels"] == {"size": 8, "dims": 3, "fitted_to": 32}
    assert more.numbers["whitened_pixels_top1_k1"] == 100.0


def test_as_an_encoder_it_gives_the_same_vectors():
    data = planted()
    encoder = WhitenedPixels(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).fit(data["train"])
    assert encoder.dim == 3
    numbers = knn(encoder, data, k=1, feature="pooled", whitened_pixels=8).numbers
    assert numbers["pooled_top1_k1"] == numbers["whitened_pixels_top1_k1"] == 100.0
    images = torch.stack([encoder.transform(image) for image in data["train"].images])
    vectors = encoder(images).pooled
    torch.testing.assert_close(vectors.square().mean(dim=0), torch.ones(3), atol=1e-4, rtol=0)


def test_images_that_cannot_be_whitened_leave_the_other_rows():
    data = {role: Pictures([picture(0, 0)] * 4, [0, 0, 1, 1]) for role in ("train", "test")}
    report = baselines(data, k=1, size=8)
    assert set(report.numbers) == {"pixels_top1_k1", "chance"} and "two different images" in report.notes[0]
    assert "whitened" not in line(report)


def test_large_sets_are_spread(monkeypatch):
    monkeypatch.setattr(module, "MOST_IMAGES", 7)
    report = baselines(planted(), k=1, size=8)
    assert (report.protocol["bank"], report.protocol["queries"]) == (7, 7)


def test_too_many_numbers_for_pca():
    with pytest.raises(UserError, match="choose a smaller size, such as 32"):
        fit_whitening(torch.zeros(9000, 9000))


def test_dimensions_follow_the_number_of_images():
    g = torch.Generator().manual_seed(0)
    for count, dims in ((5, 1), (25, 2), (400, 40), (3000, 256)):
        assert fit_whitening(torch.randn(count, 300, generator=g))[1] == {"dims": dims, "fitted_to": count}

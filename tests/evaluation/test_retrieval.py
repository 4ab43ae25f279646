"""Retrieval of planted vectors: every other protocol gives another number."""

import pytest
import torch

from maskwise.evaluation.retrieval import retrieval
from maskwise.nn.tokens import Features
from support.planted import Pictures, Plain, gray


class Angle(Plain):
    """An encoder that turns a unit vector by the mean gray value, 100 to a radian; 45 less above 224 pixels."""

    def __init__(self):
        super().__init__(2)

    def forward(self, images, **requests):
        value = images.mean(dim=(1, 2, 3)) * 255 - 45 * (max(images.shape[-2:]) > 224)
        vectors = torch.stack([(value / 100).cos(), (value / 100).sin()], dim=1)
        return Features(vectors, vectors[:, None], None, (1, 1))


@pytest.fixture
def landmark():
    """One query with one relevant image, the last: at angle 15 of 300 pixels, at 60 of 224.

    The query is at angle 0 within its box and at 150 as a whole; others are at 30, 120 and 135. The relevant image then
    has the rank 0 (box, 1024 pixels), 1 (box, 224), 3 (whole, 1024) or 2 (whole, 224).
    """
    query = gray(200, 40, 40)
    query[:, 10:30, 10:30] = 0
    database = [*(gray(value, 16, 16) for value in (30, 120, 135)), gray(60, 16, 300)]
    truth = {name: torch.tensor(rows) for name, rows in (("easy", [3]), ("hard", []), ("junk", []))}
    truth["bbx"] = torch.tensor([10.0, 10.0, 30.0, 30.0])
    return {"query": Pictures([query]), "database": Pictures(database), "ground_truth": [truth]}


def test_the_official_query_is_its_box_and_the_papers_images_have_224_pixels(landmark):
    numbers = retrieval(Angle(), landmark).numbers
    assert numbers["official_easy_map"] == pytest.approx(100)
    assert numbers["papers_easy_map"] == pytest.approx(100 / 6)  # trapezoid from 0 to 1/3 at rank 2
    assert numbers["papers_easy_mp1"] == 0 and numbers["official_easy_mp1"] == pytest.approx(100)


def test_a_given_size_applies_to_every_variant(landmark):
    small, large = (retrieval(Angle(), landmark, long_side=side).numbers for side in (224, 1024))
    assert (small["official_easy_map"], small["papers_easy_map"]) == pytest.approx((100 / 4, 100 / 6))
    assert (large["official_easy_map"], large["papers_easy_map"]) == pytest.approx((100, 100 / 8))


def test_several_scales_are_averaged(landmark):
    """The relevant image is at 15, 60 and 60: farther from the query than the image at 30."""
    numbers = retrieval(Angle(), landmark, variants="official", multi_scale=True).numbers
    assert numbers["official_easy_map"] == pytest.approx(100 / 4)

"""Copy detection of planted vectors: with and without whitening, distractors and a limit of ranks."""

import pytest

from maskwise.evaluation.copy_detection import copy_detection
from support.planted import Lookup, Pictures, gray

ROWS = [[1, 0], [0, 1], [1, 3], [0, 1], [1, 10], [-1, 10], [1, -10], [-1, -10], [1, 2.9]]
ORIGINALS, COPIES, OTHERS, DISTRACTOR = (0, 1), (2, 3), (4, 5, 6, 7), 8


def pictures(values, labels=None):
    return Pictures([gray(value) for value in values], labels, None if labels is None else ["a", "b"])


@pytest.fixture
def data():
    """The second axis varies ten times as much as the first, so that whitening divides it by ten.

    The first copy, (1, 3), then has its original (1, 0) as the nearest; without whitening the other, (0, 1), is nearer.
    """
    copies = {"strong": pictures(COPIES, [0, 1])}
    return {"database": pictures(ORIGINALS, [0, 1]), "copies": copies, "whitening": pictures(OTHERS)}


def test_whitening(data):
    assert copy_detection(Lookup(ROWS), data).numbers == pytest.approx({"strong_map": 100})
    plain = copy_detection(Lookup(ROWS), data, whitening=False)  # trapezoid from 0 to 1/2 at rank 1, and 1
    assert plain.numbers == pytest.approx({"strong_map": (25 + 100) / 2}) and not plain.protocol["whitening"]


def test_distractors_come_before_the_original(data):
    data["distractors"] = pictures([DISTRACTOR])
    assert copy_detection(Lookup(ROWS), data).numbers == pytest.approx({"strong_map": (25 + 100) / 2})
    numbers = copy_detection(Lookup(ROWS), data, whitening=False).numbers  # rank 2, and 1 of (0, 1) itself
    assert numbers == pytest.approx({"strong_map": (100 / 6 + 100) / 2})


def test_originals_after_the_last_rank_are_missed(data):
    assert copy_detection(Lookup(ROWS), data, whitening=False, top=1).numbers == pytest.approx({"strong_map": 50})

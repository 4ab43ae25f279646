import pytest
import torch

from maskwise.data.datasets.shapes import Shapes
from maskwise.data.datasets.subset import Subset, subsample_evenly


def test_rows_labels_and_annotations():
    whole = Shapes(count=12, size=32)
    some = Subset(whole, [7, 2, 2])
    assert len(some) == 3 and some.labels.tolist() == whole.labels[[7, 2, 2]].tolist() and some.classes == whole.classes
    assert (
        torch.equal(some.image(1), whole.image(2))
        and some.name(0) == whole.name(7)
        and torch.equal(some.mask(0), whole.mask(7))
    )
    with pytest.raises(IndexError, match="rows 3..12 of a dataset of 12"):
        Subset(whole, [3, 12])


def test_fingerprint_depends_on_the_rows():
    whole = Shapes(count=12, size=32)
    prints = {Subset(whole, rows).fingerprint() for rows in ([0, 1], [0, 2], [1, 0], [0, 1, 2])}
    assert len(prints) == 4 and whole.fingerprint() not in prints


def test_subsample_evenly():
    whole = Shapes(count=12, size=32)
    assert subsample_evenly(whole, 12) is whole and subsample_evenly(whole, 5).rows == [0, 2, 4, 7, 9]

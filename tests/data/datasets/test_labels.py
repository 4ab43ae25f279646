"""Numbering of labels, and labels that are missing."""

import pytest

from maskwise.data.datasets.labels import column_labels, number_labels


@pytest.mark.parametrize(
    "values, names",
    [
        (["10", "2", "-1"], ["-1", "2", "10"]),
        (["10", "2", "--1"], ["--1", "10", "2"]),
        (["10", "2", "²"], ["10", "2", "²"]),
        (["10", "2", "٣"], ["10", "2", "٣"]),
        (["1_0", "2"], ["1_0", "2"]),
        (["+3", "02", "1"], ["1", "02", "+3"]),
        (["9" * 30, "2"], ["2", "9" * 30]),
    ],
)
def test_only_plain_whole_numbers_sort_numerically(values, names):
    labels, kinds = number_labels(values)
    assert kinds == names and [kinds[k] for k in labels] == values


def test_columns_of_typed_values():
    assert column_labels([2, 0], ["cat", "dog", "eel"])[0].tolist() == [2, 0]
    assert column_labels([2, 5], ["cat", "dog", "eel"])[2] == "has label 5, and there are 3 classes"
    assert column_labels(["b", None, "", "a"])[2] == "has no label in 2 of 4 rows (the first: row 1)"
    assert column_labels([1, -1, 2])[2] == "has no label in 1 of 3 rows (the first: row 1)"
    labels, names, reason = column_labels([1, -1, 1])
    assert labels.tolist() == [1, 0, 1] and names == ["-1", "1"] and reason is None

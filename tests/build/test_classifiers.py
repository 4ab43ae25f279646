"""Accuracy of a supervised run's own classifier on test images whose classes have other numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maskwise.build.classifiers import accuracy
from maskwise.build.supervised import check_test
from maskwise.errors import UserError
from support.tiny_sets import Colors, Part, Renamed, tiny_encoder


class Head(nn.Linear):
    """A linear classifier of the pooled vector."""

    layers = ()

    def __init__(self, classes):
        super().__init__(24, classes)
        self.classes = classes

    def forward(self, features):
        return super().forward(features.pooled)


def model(classes):
    encoder = tiny_encoder(depth=1)
    torch.manual_seed(1)
    network = SimpleNamespace(encoder=encoder, head=Head(classes))
    return SimpleNamespace(teacher=network, student=network)


def test_classes_are_matched_by_name():
    test, trained = Colors(30), model(3)
    expected = accuracy(test, None, ["c0", "c1", "c2"], trained).numbers
    assert 0 < expected["top1"] < 100
    for order in ([1, 2, 0], [2, 1, 0]):
        shuffled = Renamed(test, order)
        check_test(test, shuffled)
        assert accuracy(shuffled, None, ["c0", "c1", "c2"], trained).numbers == expected
    assert accuracy(test, None, ["c1", "c2", "c0"], trained).numbers != expected


def test_a_thousand_classes_need_not_be_those_of_imagenet():
    numbers = accuracy(Colors(6, classes=1000), None, [f"c{i}" for i in range(1000)], model(1000)).numbers
    assert set(numbers) == {"top1", "top5"}


def test_other_classes_are_refused():
    with pytest.raises(UserError, match="the test set has no images of class c0; give test images of the same classes"):
        check_test(Colors(9), Part(Colors(9)))
    with pytest.raises(UserError, match="the test set has class c2, which the training images do not have"):
        check_test(Colors(9, classes=2), Colors(9))

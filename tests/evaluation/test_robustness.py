"""Robustness of planted scores: restricted to the classes of the shifted set, drop from the same classes."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from maskwise.evaluation.robustness import robustness
from support.planted import Lookup, Pictures, gray

WNIDS = ["n01440764", "n02102040", "n02110958", "n01530575"]
# scores of four classes; the shifted set has the first two
ROWS = [
    [9, 1, 0, 0],  # 0 the first class, with and without restriction
    [5, 1, 9, 0],  # 1 the first class only under restriction
    [1, 5, 0, 9],  # 2 the second class only under restriction
    [0, 0, 9, 1],  # 3 the third class
    [1, 5, 9, 0],  # 4 the third class, the second under restriction
]


@pytest.fixture
def classifier():
    encoder = Lookup(ROWS)
    return SimpleNamespace(encoder=encoder, head=nn.Identity(), feature="pooled", count=4, classes=WNIDS)


def pictures(values, labels, classes=WNIDS):
    return Pictures([gray(value) for value in values], labels, classes)


def test_scores_of_shifted_and_of_clean_images_are_restricted(classifier):
    test = pictures([0, 1, 2, 4, 3, 3, 3, 3], [0, 0, 1, 0, 2, 2, 2, 3])
    shifted = pictures([0, 1, 2, 2, 4], [0, 0, 1, 0, 0], WNIDS[:2])
    numbers = robustness(classifier.encoder, {"test": test}, classifier=classifier, imagenet_r=shifted).numbers
    assert numbers == pytest.approx(
        {
            "top1": 100 * 4 / 8,  # over all classes
            "imagenet_r_top1": 100 * 3 / 5,  # 1/5 without restriction
            "imagenet_r_clean_top1": 100 * 3 / 4,  # 1/4 without restriction; images of other classes do not count
            "imagenet_r_drop": 15,
        }
    )


def test_real_labels_by_hand(classifier, tmp_path):
    """Predicted are ImageNet's 0, 254, 10 and 254: the first and the third of three images with labels are right."""
    (tmp_path / "real.json").write_text(json.dumps([[0, 9], [0], [10], []]))
    test = pictures([0, 1, 2, 3], [0, 0, 1, 2])
    test.name = lambda i: f"ILSVRC2012_val_{i + 1:08d}.JPEG"
    report = robustness(classifier.encoder, {"test": test}, classifier=classifier, real=tmp_path / "real.json")
    assert report.numbers["real_top1"] == pytest.approx(100 * 2 / 3) and report.protocol["images"]["real"] == 3

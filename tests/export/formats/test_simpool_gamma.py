"""SimPool's exponent: given, stored in the run's arguments, or told by a released model's name."""

from pathlib import Path

import pytest

from maskwise.errors import UserError
from maskwise.export.formats.simpool_gamma import gamma_of

HERE = Path("vits_dino_simpool_ep100.pth")


@pytest.mark.parametrize(
    "path, gamma",
    [
        ("vits_dino_simpool_ep100.pth", 1.25),
        ("a/vits_dino_simpool_ep300/checkpoint.pth", 1.25),
        ("vits_dino_simpool_no_gamma_ep100.pth", None),
        ("resnet50_dino_simpool_ep100.pth", 2.0),
        ("convnext_small_dino_simpool_ep100.pth", 2.0),
        ("vits_supervised_simpool_ep300.pth.tar", 1.25),
        ("vits_supervised_simpool_no_gamma_ep100.pth.tar", None),
        ("resnet50_supervised_simpool_ep100.pth.tar", 2.0),
        ("hub/models--billpsomas--resnet50_dino_simpool_no_gamma_ep100/snapshots/0f/checkpoint.pth", None),
        ("vits_dino_simpool_no_gamma_ep100/resnet50_dino_simpool_ep100.pth", 2.0),  # the file's own name first
    ],
)
def test_released_names(path, gamma):
    assert gamma_of({}, {}, Path(path)) == gamma


@pytest.mark.parametrize(
    "path", ["my_vits_dino_simpool_ep100.pth", "vits_dino_simpool.pth", "vitb_dino_simpool_ep100.pth", "checkpoint.pth"]
)
def test_other_names_tell_nothing(path):
    with pytest.raises(UserError, match="does not say which gamma its SimPool had"):
        gamma_of({}, {}, Path(path))
    assert gamma_of({}, {"unstored_gamma": 3.0}, Path(path)) == 3.0


def test_order():
    assert gamma_of({"gamma": 1.5}, {"gamma": 1.75, "unstored_gamma": 3.0}, HERE) == 1.75
    assert gamma_of({"gamma": 1.5}, {"unstored_gamma": 3.0}, HERE) == 1.5
    assert gamma_of({"gamma": 2}, {}, HERE) == 2.0
    assert gamma_of({"gamma": None}, {}, HERE) is None and gamma_of({"gamma": "None"}, {}, HERE) is None
    assert gamma_of({}, {"unstored_gamma": 3.0}, HERE) == 1.25


@pytest.mark.parametrize("value", ["high", True, [1, 2], 0, -1.0, float("nan"), float("inf")])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match="in its arguments is no positive number: give gamma="):
        gamma_of({"gamma": value}, {}, HERE)

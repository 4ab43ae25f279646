"""The steps built from timm and lightly equal maskwise."""

import importlib.util

import pytest
import torch

from maskwise.bench.baselines.timm_step import LightlyStep, TimmStep
from support.baseline_pair import pair, take_steps

KINDS = [
    TimmStep,
    pytest.param(
        LightlyStep,
        marks=pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed"),
    ),
]


@pytest.mark.parametrize("size, local_size", [((32, 32), (16, 16)), ((24, 40), (16, 24))])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_the_losses_of_maskwise(kind, size, local_size):
    trainer, theirs = pair(kind, torch.float32, prob=0.9, centers=True, size=size)
    for ours, other in take_steps(trainer, theirs, 1, torch.float32, size, local_size):
        assert float(ours["mask_share"]) == pytest.approx(float(other["mask_share"]), abs=1e-7)
        assert float(other["mask_share"]) > 0, "nothing was masked"
        for key in ("loss", "cls", "patch"):
            assert float(ours[key]) == pytest.approx(float(other[key]), rel=1e-5), key


def test_timm_parts_take_the_same_steps():
    trainer, theirs = pair(TimmStep, torch.float64, prob=0.9, centers=True)
    for ours, other in take_steps(trainer, theirs, 4, torch.float64):
        for key in ("loss", "cls", "patch", "mask_share"):
            assert float(ours[key]) == pytest.approx(float(other[key]), rel=1e-10), key
    assert float((trainer.method.center - theirs.center).abs().max()) < 1e-10
    assert float((trainer.method.patch_center - theirs.patch_center).abs().max()) < 1e-10


@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed")
def test_lightly_has_the_cls_loss_of_maskwise_without_masks():
    trainer, theirs = pair(LightlyStep, torch.float32, prob=0.9, centers=True)
    trainer.method.masking.prob = 0.0
    for ours, other in take_steps(trainer, theirs, 2, torch.float32):
        assert float(other["patch"]) == float(other["mask_share"]) == 0
        assert float(ours["cls"]) == pytest.approx(float(other["cls"]), rel=1e-5)

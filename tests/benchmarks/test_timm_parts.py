"""The steps from timm's and lightly's parts compute what maskwise computes."""

import importlib.util

import pytest
import torch
from benchmarks.timm_parts import LightlyStep, TimmStep

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Trainer
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import MASKINGS, Keys
from maskwise.nn import CLS, Backbone, Encoder, ProjectionHead

SAMPLES, LOCALS = 3, 2
SHAPE = dict(size=32, patch=8, dim=48, depth=2, heads=3, prototypes=40, hidden=64, bottleneck=16)
KINDS = [TimmStep, pytest.param(LightlyStep, marks=pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed"))]


def pair(kind, dtype):
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mask_token=True)
    head = ProjectionHead(48, 40, hidden=64, bottleneck=16, norm_last_layer=False)
    masking = MASKINGS["attmask_high"](ratio=0.4, var=0.2, prob=0.9, seed=1)
    ours = IBOT(Encoder(backbone, CLS(48)), head, masking, teacher_temp=0.07, warmup_teacher_temp=0.05, warmup_teacher_temp_epochs=2, seed=1).to(dtype)
    for tensor in (*ours.parameters(), ours.center, ours.patch_center):
        tensor.data.add_(0.1 * torch.randn_like(tensor))
    trainer = Trainer(
        ours, optimizer=make_optimizer("adamw", parameter_groups(ours)), world=World(), lr=lambda step: 1e-3, weight_decay=lambda step: 0.04 + 0.1 * step,
        momentum=lambda step: 0.9, steps_per_epoch=2, total_steps=4, clip=0.3,
    )  # fmt: skip
    theirs = kind(SHAPE, clip=0.3, dtype=dtype)
    theirs.load(ours.state_dict())
    return trainer, theirs


def steps(trainer, theirs, count, dtype):
    """(ours, theirs) of each step on crops that change with it."""
    ours, ids = trainer.method, torch.arange(SAMPLES) * 5 + 1
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        globals_ = torch.randn(2 * SAMPLES, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        locals_ = torch.randn(LOCALS * SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        ratios = ours.masking.ratios(Keys(1, step, ids.repeat(2), torch.arange(2).repeat_interleave(SAMPLES)))
        temps = {"teacher_temp": ours.cls_temperature(step // 2), "patch_temp": ours.patch_temperature(step // 2)}
        schedule = {"lr": 1e-3, "weight_decay": trainer.weight_decay(step), "momentum": 0.9, "hold_last_layer": step < 2}
        other = theirs.step(list(globals_.chunk(2)), list(locals_.chunk(LOCALS)), ratios, **temps, **schedule)
        yield trainer.step(globals_, locals_, ids), other


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_our_losses(kind):
    trainer, theirs = pair(kind, torch.float32)
    for ours, other in steps(trainer, theirs, 1, torch.float32):
        assert float(ours["mask_share"]) == pytest.approx(float(other["mask_share"]), abs=1e-7)
        assert float(other["mask_share"]) > 0, "nothing was masked"
        for key in ("loss", "cls", "patch"):
            assert float(ours[key]) == pytest.approx(float(other[key]), rel=1e-5), key


def test_timm_parts_take_the_same_steps():
    trainer, theirs = pair(TimmStep, torch.float64)
    for ours, other in steps(trainer, theirs, 4, torch.float64):
        for key in ("loss", "cls", "patch", "mask_share"):
            assert float(ours[key]) == pytest.approx(float(other[key]), rel=1e-10), key
    assert float((trainer.method.center - theirs.center).abs().max()) < 1e-10
    assert float((trainer.method.patch_center - theirs.patch_center).abs().max()) < 1e-10


@pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed")
def test_lightly_parts_take_our_image_term_where_nothing_is_masked():
    trainer, theirs = pair(LightlyStep, torch.float32)
    trainer.method.masking.prob = 0.0
    for ours, other in steps(trainer, theirs, 2, torch.float32):
        assert float(other["patch"]) == float(other["mask_share"]) == 0
        assert float(ours["cls"]) == pytest.approx(float(other["cls"]), rel=1e-5)

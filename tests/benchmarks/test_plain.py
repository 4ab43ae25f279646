"""The plain baseline computes what maskwise computes: losses, masks, weights and centers over several steps."""

import pytest
import torch
from benchmarks.plain import PlainStep

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Trainer
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import MASKINGS, Keys
from maskwise.nn import CLS, Backbone, Encoder, ProjectionHead

SAMPLES, LOCALS = 3, 2
SHAPE = dict(size=32, patch=8, dim=48, depth=2, heads=3, prototypes=40, hidden=64, bottleneck=16)


def pair(dtype):
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mask_token=True)
    head = ProjectionHead(48, 40, hidden=64, bottleneck=16, norm_last_layer=False)
    masking = MASKINGS["attmask_high"](ratio=0.4, var=0.2, prob=0.7, seed=1)
    ours = IBOT(Encoder(backbone, CLS(48)), head, masking, teacher_temp=0.07, warmup_teacher_temp=0.05, warmup_teacher_temp_epochs=2, seed=1).to(dtype)
    for parameter in ours.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    trainer = Trainer(
        ours, optimizer=make_optimizer("adamw", parameter_groups(ours)), world=World(), lr=lambda step: 1e-3, weight_decay=lambda step: 0.04 + 0.1 * step,
        momentum=lambda step: 0.9, steps_per_epoch=2, total_steps=4, clip=0.3,
    )  # fmt: skip
    plain = PlainStep(SHAPE, clip=0.3, dtype=dtype)
    plain.load(ours.state_dict())
    return trainer, plain


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_plain_and_ours_take_the_same_steps(dtype, near):
    trainer, plain = pair(dtype)
    ours = trainer.method
    ids = torch.arange(SAMPLES) * 5 + 1
    hidden = 0
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        globals_ = torch.randn(2 * SAMPLES, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        locals_ = torch.randn(LOCALS * SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        keys = Keys(1, step, ids.repeat(2), torch.arange(2).repeat_interleave(SAMPLES))
        temps = {"teacher_temp": ours.cls_temperature(step // 2), "patch_temp": ours.patch_temperature(step // 2)}
        schedule = {"lr": 1e-3, "weight_decay": trainer.weight_decay(step), "momentum": 0.9, "hold_last_layer": step < 2}
        theirs = plain.step(list(globals_.chunk(2)), list(locals_.chunk(LOCALS)), ours.masking.ratios(keys), **temps, **schedule)
        seen = trainer.step(globals_, locals_, ids)
        hidden += theirs["mask_share"]
        assert float(seen["mask_share"]) == pytest.approx(theirs["mask_share"], abs=1e-7)
        for key in ("loss", "cls", "patch"):
            assert float(seen[key]) == pytest.approx(theirs[key], rel=near), (step, key)
    assert hidden > 0, "nothing was masked in four steps"
    assert float((ours.center - plain.center[0]).abs().max()) < near
    assert float((ours.patch_center - plain.patch_center[0, 0]).abs().max()) < near
    state = ours.state_dict()
    other = PlainStep(SHAPE, dtype=dtype)
    other.load(state)
    for one, two in ((other.student, plain.student), (other.teacher, plain.teacher)):
        for (name, mine), its in zip(one.named_parameters(), two.parameters()):
            # Adam turns gradients that are rounding errors into whole steps of 1e-3; they are few.
            assert float((mine - its).detach().abs().mean()) < 10 * near, name

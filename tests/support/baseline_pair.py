"""The trainer of a tiny iBOT with AttMask-High, and a baseline's step with the same weights, for tests of baselines."""

import torch

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import MASKINGS, ViewKeys
from maskwise.nn import CLS, Backbone, Encoder, ProjectionHead

SAMPLES, LOCALS = 3, 2
SHAPE = dict(size=(32, 32), patch=8, dim=48, depth=2, heads=3, prototypes=40, hidden=64, bottleneck=16)


def pair(baseline, dtype, *, prob, centers=False, size=(32, 32)):
    """Return the trainer and the baseline; `prob` of masking a view, `centers`: whether they differ from 0.

    size: (h, w) of the global crops.
    """
    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=size, patch_size=8, embed_dim=48, depth=2, num_heads=3, mask_token=True
    )
    head = ProjectionHead(48, 40, hidden=64, bottleneck=16, norm_last_layer=False)
    temperatures = {"teacher_temp": 0.07, "warmup_teacher_temp": 0.05, "warmup_teacher_temp_epochs": 2}
    masking = MASKINGS["attmask_high"](ratio=0.4, var=0.2, prob=prob, seed=1)
    method = IBOT(Encoder(backbone, CLS(48)), head, masking, seed=1, **temperatures).to(dtype)
    for tensor in (*method.parameters(), *((method.center, method.patch_center) if centers else ())):
        tensor.data.add_(0.1 * torch.randn_like(tensor))
    schedules = Schedules(
        lr=lambda step: 1e-3,
        weight_decay=lambda step: 0.04 + 0.1 * step,
        momentum=lambda step: 0.9,
        steps_per_epoch=2,
        total_steps=4,
    )
    optimizer = make_optimizer("adamw", parameter_groups(method))
    trainer = Trainer(method, optimizer=optimizer, world=World(), schedules=schedules, clip=0.3)
    step = baseline({**SHAPE, "size": size}, clip=0.3, dtype=dtype)
    step.load(method.state_dict())
    return trainer, step


def take_steps(trainer, baseline, count, dtype, size=(32, 32), local_size=(16, 16)):
    """Yield (ours, theirs), the losses of each step on crops (h, w) that change with it."""
    ours, ids = trainer.method, torch.arange(SAMPLES) * 5 + 1
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        globals_ = torch.randn(2 * SAMPLES, 3, *size, generator=generator, dtype=torch.float64).to(dtype)
        locals_ = torch.randn(LOCALS * SAMPLES, 3, *local_size, generator=generator, dtype=torch.float64).to(dtype)
        ratios = ours.masking.ratios(ViewKeys(1, step, ids.repeat(2), torch.arange(2).repeat_interleave(SAMPLES)))
        temps = {"teacher_temp": ours.cls_temperature(step // 2), "patch_temp": ours.patch_temperature(step // 2)}
        schedule = {
            "lr": 1e-3,
            "weight_decay": trainer.schedules.weight_decay(step),
            "momentum": 0.9,
            "hold_last_layer": step < 2,
        }
        theirs = baseline.step(list(globals_.chunk(2)), list(locals_.chunk(LOCALS)), ratios, **temps, **schedule)
        yield trainer.step(globals_, locals_, ids), theirs

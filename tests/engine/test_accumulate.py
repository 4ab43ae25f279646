"""Micro-batches equal the whole batch: losses, centers, weights, for all methods and targets, across a resume."""

import copy

import pytest
import torch

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer, micro_batches
from maskwise.errors import UserError
from support.tiny_networks import crops, method

STEPS = 3


def make_trainer(model, accumulate, **options):
    return Trainer(
        model,
        optimizer=make_optimizer("sgd", parameter_groups(model)),
        world=World(),
        schedules=Schedules(
            lr=lambda step: 0.1,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.8,
            steps_per_epoch=2,
            total_steps=STEPS,
        ),
        clip=0.5,
        accumulate=accumulate,
        **options,
    )


ARRANGEMENTS = [
    {},
    {"pooling": "simpool", "masking": "block"},
    {"patch_loss": "token"},
    {"targets": "sinkhorn", "patch_loss": "token"},
    {"targets": "sinkhorn", "pad_multiple": 10, "head": {"patch_prototypes": 5}},
    {"name": "dino", "masking": None},
    {"name": "dino", "masking": "attmask_high", "targets": "sinkhorn"},
    {"name": "dino", "masking": "attmask_high", "koleo": 0.5},
    {"koleo": 0.5, "visible_weight": 0.5, "patch_loss": "token", "targets": "sinkhorn"},
]


@pytest.mark.parametrize("options", ARRANGEMENTS, ids=lambda o: "-".join(str(v) for v in o.values()) or "ibot")
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_micro_batches_equal_one_batch(options, dtype, near):
    runs = []
    for accumulate in (1, 2, 4):
        trainer = make_trainer(method(drop_path=0.5, dtype=dtype, **options), accumulate)
        outputs = [trainer.step(*crops(4, 2, dtype, seed=step)) for step in range(STEPS)]
        assert not any(value.requires_grad for output in outputs for value in output.values())
        runs.append(
            (
                [
                    {key: output[key] for key in ("loss", "cls", "patch", "mask_share", "grad_norm")}
                    for output in outputs
                ],
                trainer.method.state_dict(),
            )
        )
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=near, atol=near)


def test_non_finite_micro_batch_skips_the_whole_step():
    trainer = make_trainer(method(dtype=torch.float32), 2)
    trainer.step(*crops(dtype=torch.float32))
    before = copy.deepcopy(trainer.tensors())
    global_crops, local_crops, ids = crops(dtype=torch.float32)
    global_crops[0, 0, 0, 0] = float("nan")  # of sample 0: the first micro-batch alone
    assert not trainer.step(global_crops, local_crops, ids)["ok"]
    torch.testing.assert_close(trainer.tensors(), before, rtol=0, atol=0)


def test_resume_with_micro_batches_is_bit_identical():
    original, resumed = (make_trainer(method(drop_path=0.5, dtype=torch.float32), 2) for _ in range(2))
    original.step(*crops(dtype=torch.float32))
    model, moments = copy.deepcopy(original.tensors())
    resumed.load_tensors(model, moments, step=1)
    for trainer in (original, resumed):
        for step in (1, 2):
            trainer.step(*crops(dtype=torch.float32, seed=step))
    torch.testing.assert_close(resumed.tensors(), original.tensors(), rtol=0, atol=0)


def test_views_of_a_sample_share_a_micro_batch():
    global_crops, local_crops, ids = crops(4, 3)
    parts = micro_batches(global_crops, local_crops, ids, 2)
    assert [len(tensor) for part in parts for tensor in part] == [4, 6, 2] * 2
    assert torch.equal(parts[1][0], global_crops[[2, 3, 6, 7]]) and torch.equal(
        parts[1][1], local_crops[[2, 3, 6, 7, 10, 11]]
    )
    assert micro_batches(global_crops, None, ids, 4)[3][1] is None
    with pytest.raises(UserError, match="do not divide into 3"):
        micro_batches(global_crops, local_crops, ids, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_does_not_synchronize_with_the_host(accumulate):
    model = method(drop_path=0.1, dtype=torch.float32, patch_loss="token", pad_multiple=16)
    trainer = Trainer(
        model.cuda(),
        optimizer=make_optimizer("adamw", parameter_groups(model)),
        world=World(device=torch.device("cuda", 0)),
        schedules=Schedules(
            lr=lambda step: 1e-3,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.9,
            steps_per_epoch=2,
            total_steps=8,
        ),
        accumulate=accumulate,
        precision="bf16",
    )
    global_crops, local_crops, ids = crops(dtype=torch.float32)
    batch = global_crops.cuda(), local_crops.cuda(), ids
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set up libraries
        try:
            output = trainer.step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert output["ok"] and output["loss"].isfinite()

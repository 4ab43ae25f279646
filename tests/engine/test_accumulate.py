"""k micro-batches take the step that the whole batch takes: losses, centers, weights; all methods and targets; across a resume."""

import copy

import pytest
import torch
from methods.tiny_networks import crops, method

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Trainer, micro_batches
from maskwise.functional.errors import UserError

STEPS = 3


def trainer(made, accumulate, **options):
    return Trainer(
        made, optimizer=make_optimizer("sgd", parameter_groups(made)), world=World(), lr=lambda step: 0.1, weight_decay=lambda step: 0.04,
        momentum=lambda step: 0.8, steps_per_epoch=2, total_steps=STEPS, clip=0.5, accumulate=accumulate, **options,
    )  # fmt: skip


ARRANGEMENTS = [
    {},
    {"pooling": "simpool", "masking": "block"},
    {"patch_loss": "token"},
    {"targets": "sinkhorn", "patch_loss": "token"},
    {"targets": "sinkhorn", "pad_rows": 10, "head": {"patch_prototypes": 5}},
    {"name": "dino", "masking": None},
    {"name": "dino", "masking": "attmask_high", "targets": "sinkhorn"},
]


@pytest.mark.parametrize("options", ARRANGEMENTS, ids=lambda o: "-".join(str(v) for v in o.values()) or "ibot")
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_micro_batches_are_one_batch(options, dtype, near):
    runs = []
    for accumulate in (1, 2, 4):
        it = trainer(method(drop_path=0.5, dtype=dtype, **options), accumulate)
        seen = [it.step(*crops(4, 2, dtype, seed=step)) for step in range(STEPS)]
        assert not any(value.requires_grad for each in seen for value in each.values())
        runs.append(([{key: each[key] for key in ("loss", "cls", "patch", "mask_share", "grad_norm")} for each in seen], it.method.state_dict()))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=near, atol=near)


def test_a_bad_micro_batch_drops_the_whole_step():
    it = trainer(method(dtype=torch.float32), 2)
    it.step(*crops(dtype=torch.float32))
    before = copy.deepcopy(it.tensors())
    global_crops, local_crops, ids = crops(dtype=torch.float32)
    global_crops[0, 0, 0, 0] = float("nan")  # of sample 0: the first micro-batch alone
    assert not it.step(global_crops, local_crops, ids)["ok"]
    torch.testing.assert_close(it.tensors(), before, rtol=0, atol=0)


def test_it_goes_on_bit_for_bit_after_a_resume():
    one, two = (trainer(method(drop_path=0.5, dtype=torch.float32), 2) for _ in range(2))
    one.step(*crops(dtype=torch.float32))
    model, moments = copy.deepcopy(one.tensors())
    two.load_tensors(model, moments, step=1)
    for it in (one, two):
        for step in (1, 2):
            it.step(*crops(dtype=torch.float32, seed=step))
    torch.testing.assert_close(two.tensors(), one.tensors(), rtol=0, atol=0)


def test_samples_go_whole_into_their_micro_batch():
    global_crops, local_crops, ids = crops(4, 3)
    parts = micro_batches(global_crops, local_crops, ids, 2)
    assert [len(each) for part in parts for each in part] == [4, 6, 2] * 2
    assert torch.equal(parts[1][0], global_crops[[2, 3, 6, 7]]) and torch.equal(parts[1][1], local_crops[[2, 3, 6, 7, 10, 11]])
    assert micro_batches(global_crops, None, ids, 4)[3][1] is None
    with pytest.raises(UserError, match="do not divide into 3"):
        micro_batches(global_crops, local_crops, ids, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_whole_step_waits_for_nothing(accumulate):
    made = method(drop_path=0.1, dtype=torch.float32, patch_loss="token", pad_rows=16)
    it = Trainer(
        made.cuda(), optimizer=make_optimizer("adamw", parameter_groups(made)), world=World(device=torch.device("cuda", 0)), lr=lambda step: 1e-3,
        weight_decay=lambda step: 0.04, momentum=lambda step: 0.9, steps_per_epoch=2, total_steps=8, accumulate=accumulate, precision="bf16",
    )  # fmt: skip
    global_crops, local_crops, ids = crops(dtype=torch.float32)
    batch = global_crops.cuda(), local_crops.cuda(), ids
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set up libraries
        try:
            seen = it.step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert seen["ok"] and seen["loss"].isfinite()

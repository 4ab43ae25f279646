"""One rank, then two, then one again: the run of one rank, its data order, masks and losses (DESIGN.md 7)."""

import json
import os
import signal
import sys
from pathlib import Path

import pair
import pytest
import torch
from test_two_ranks import POOLINGS, STEPS, TOLERANCES, build, record

import maskwise
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.journal import read_metrics
from maskwise.engine.trainer import Trainer

PARTS = (range(3), range(3, 7), range(7, STEPS))
CASES = [(pooling, dtype) for pooling in POOLINGS for dtype in TOLERANCES]
TINY = ("data.count=40", "train.epochs=3", "train.save_every=4", "evaluate.pictures_every=0", "evaluate.limit_bank=16")  # 15 steps
TIMES = {"img_s", "data_wait", "seconds"}
# signs of health tell of a rank's own images and patches: their means over ranks are no numbers of the global batch
OF_ONE_RANK = {"feature_std", "feature_rank", "feature_twins", "teacher_spread", "mask_agreement", "patch_entropy", "patch_spread"}


def go_on(world, folder, steps):
    """These steps of every case, from the checkpoint that is there to the one they leave."""
    seen = {}
    for case in CASES:
        pooling, dtype = case
        store = Checkpoints(folder / "-".join(case), world=world)
        trainer, found = build(world, pooling, getattr(torch, dtype)), store.load_last()
        assert (found.step if found else 0) == steps.start
        if found:
            trainer.load_tensors(found.tensors, found.optimizer, step=found.step)
        seen[case] = record(world, pooling, getattr(torch, dtype), steps=steps, trainer=trainer)
        store.save(steps.stop, *trainer.tensors())
    return seen


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """What one rank saw in ten steps, and what was seen in three, four and three by one, two and one; where the checkpoints lie."""
    folder = tmp_path_factory.mktemp("changing")
    whole = {(pooling, dtype): record(World(), pooling, getattr(torch, dtype)) for pooling, dtype in CASES}
    first = go_on(World(), folder, PARTS[0])
    pair.end(pair.start(__file__, "steps", folder))
    last = go_on(World(), folder, PARTS[2])
    two = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return whole, [{case: {key: torch.cat([part[case][key] for part in (first, rank, last)]) for key in whole[case]} for case in CASES} for rank in two]


@pytest.mark.parametrize("pooling, dtype", CASES)
def test_ranks_that_change_between_starts_change_nothing(recordings, pooling, dtype):
    absolute, relative = TOLERANCES[dtype]
    whole, changed = recordings
    one = whole[pooling, dtype]
    for other in (seen[pooling, dtype] for seen in changed):
        assert torch.equal(one["masks"], other["masks"]) and torch.equal(one["kept"], other["kept"])
        for key in ("loss", "center", "patch_center"):
            allowed = absolute + relative * one[key].abs().amax(-1, keepdim=True)
            off = (one[key] - other[key]).abs()
            assert (off <= allowed).all(), f"{key} off by {off.max():.3g}"


def told_at(at: int | None, rank: int, file: Path, patch):
    """Write down the sample ids of every step; at step `at`, tell the last rank to stop."""
    step = Trainer.step

    def watched(trainer, *arguments, sample_ids):
        with open(file, "a") as lines:
            lines.write(json.dumps([trainer.step_index, sample_ids.tolist()]) + "\n")
        if trainer.step_index == at and rank == trainer.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, sample_ids=sample_ids)

    patch.setattr(Trainer, "step", watched)


def tiny(folder, at=None, rank=0):
    """debug/tiny in a folder, told to stop in step `at`; sample ids go to a file beside it."""
    recipe = maskwise.read_recipe("configs/debug/tiny.yaml", *TINY)
    with pytest.MonkeyPatch.context() as patch:
        told_at(at, rank, folder.with_name(f"{folder.name}.ids{rank}"), patch)
        return maskwise.train(recipe, out=folder, quiet=True)


def order(*files) -> dict[int, list[int]]:
    """The sample ids of each step, rank by rank."""
    seen: dict[int, list[int]] = {}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            step, ids = json.loads(line)
            seen[step] = seen.get(step, []) + ids
    return seen


@pytest.mark.slow
def test_the_same_command_with_one_two_and_one_ranks(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert tiny(whole)["status"] == "complete"
    assert tiny(folder, at=3) == {"status": "preempted", "step": 4, "skipped": 0, "folder": str(folder)}
    pair.end(pair.start(__file__, "train", folder, 8))
    assert (folder / "preempted").read_text() == "9\n"
    assert tiny(folder)["status"] == "complete"
    assert order(tmp_path / "run.ids0", tmp_path / "run.ids1") == order(tmp_path / "whole.ids0")
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [(start["step"], start["ranks"]) for start in starts] == [(0, 1), (4, 2), (9, 1)]
    one, other = (read_metrics(place / "metrics.jsonl") for place in (whole, folder))
    assert [(line["step"], "loss" in line) for line in one] == [(line["step"], "loss" in line) for line in other]
    for expected, found in zip(one, other):
        for key in expected.keys() - TIMES - OF_ONE_RANK - {"report", "numbers", "step"}:
            assert found[key] == pytest.approx(expected[key], rel=2e-6, abs=1e-9), (expected["step"], key)
    assert [line["mask_share"] for line in one if "loss" in line] == [line["mask_share"] for line in other if "loss" in line]


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "steps":
        world = World.start("cpu")
        torch.save(go_on(world, place, PARTS[1]), place / f"{world.rank}.pt")
        world.close()
    else:
        tiny(place, at=int(sys.argv[3]), rank=int(os.environ["RANK"]))

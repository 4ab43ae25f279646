"""Runs continued on one, two and one ranks: equal to a run of one rank in data order, masks and losses."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import maskwise
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from runs.test_two_ranks import POOLINGS, STEPS, TOLERANCES, build, record
from support import pair

PARTS = (range(3), range(3, 7), range(7, STEPS))
CASES = [(pooling, dtype) for pooling in POOLINGS for dtype in TOLERANCES]
# 15 steps
TINY = ("data.count=40", "train.epochs=3", "train.save_every=4", "evaluate.pictures_every=0", "evaluate.limit_bank=16")
TIMES = {"img_s", "data_wait", "seconds"}
# signs of health tell of a rank's own images and patches: their means over ranks are no numbers of the global batch
OF_ONE_RANK = {
    "feature_std",
    "feature_rank",
    "feature_duplicates",
    "teacher_spread",
    "mask_agreement",
    "patch_entropy",
    "patch_spread",
}


def run_steps(world, folder, steps):
    """These steps of every case, from the checkpoint that is there to the one they leave."""
    records = {}
    for case in CASES:
        pooling, dtype = case
        store = Checkpoints(folder / "-".join(case), world=world)
        trainer, loaded = build(world, pooling, getattr(torch, dtype)), store.load_last()
        assert (loaded.step if loaded else 0) == steps.start
        if loaded:
            trainer.load_tensors(loaded.tensors, loaded.optimizer, step=loaded.step)
        records[case] = record(world, pooling, getattr(torch, dtype), steps=steps, trainer=trainer)
        store.save(steps.stop, *trainer.tensors())
    return records


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Train ten steps on one rank, and three, four and three on one, two and one; returns records and folders."""
    folder = tmp_path_factory.mktemp("changing")
    reference = {(pooling, dtype): record(World(), pooling, getattr(torch, dtype)) for pooling, dtype in CASES}
    first = run_steps(World(), folder, PARTS[0])
    pair.end(pair.start(__file__, "steps", folder))
    last = run_steps(World(), folder, PARTS[2])
    two = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return reference, [
        {
            case: {key: torch.cat([part[case][key] for part in (first, rank, last)]) for key in reference[case]}
            for case in CASES
        }
        for rank in two
    ]


@pytest.mark.parametrize("pooling, dtype", CASES)
def test_number_of_ranks_may_change_between_starts(recordings, pooling, dtype):
    absolute, relative = TOLERANCES[dtype]
    reference, changed = recordings
    expected = reference[pooling, dtype]
    for actual in (records[pooling, dtype] for records in changed):
        assert torch.equal(expected["masks"], actual["masks"]) and torch.equal(expected["draws"], actual["draws"])
        for key in ("loss", "center", "patch_center"):
            allowed = absolute + relative * expected[key].abs().amax(-1, keepdim=True)
            off = (expected[key] - actual[key]).abs()
            assert (off <= allowed).all(), f"{key} off by {off.max():.3g}"


def signal_at(at: int | None, rank: int, file: Path, patch):
    """Write down the sample ids of every step; at step `at`, tell the last rank to stop."""
    step = Trainer.step

    def watched(trainer, *arguments, sample_ids, **options):
        with open(file, "a") as lines:
            lines.write(json.dumps([trainer.step_index, sample_ids.tolist()]) + "\n")
        if trainer.step_index == at and rank == trainer.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, sample_ids=sample_ids, **options)

    patch.setattr(Trainer, "step", watched)


def tiny(folder, at=None, rank=0):
    """debug/tiny in a folder, told to stop in step `at`; sample ids go to a file beside it."""
    recipe = maskwise.read_recipe("configs/debug/tiny.yaml", *TINY)
    with pytest.MonkeyPatch.context() as patch:
        signal_at(at, rank, folder.with_name(f"{folder.name}.ids{rank}"), patch)
        return maskwise.train(recipe, out=folder, quiet=True)


def order(*files) -> dict[int, list[int]]:
    """The sample ids of each step, rank by rank."""
    ids_of_step: dict[int, list[int]] = {}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            step, ids = json.loads(line)
            ids_of_step[step] = ids_of_step.get(step, []) + ids
    return ids_of_step


@pytest.mark.slow
def test_same_command_with_one_two_and_one_ranks(tmp_path):
    reference, folder = tmp_path / "whole", tmp_path / "run"
    assert tiny(reference)["status"] == "complete"
    assert tiny(folder, at=3) == {"status": "preempted", "step": 4, "skipped": 0, "folder": str(folder)}
    pair.end(pair.start(__file__, "train", folder, 8))
    assert (folder / "preempted").read_text() == "9\n"
    assert tiny(folder)["status"] == "complete"
    assert order(tmp_path / "run.ids0", tmp_path / "run.ids1") == order(tmp_path / "whole.ids0")
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [(start["step"], start["ranks"]) for start in starts] == [(0, 1), (4, 2), (9, 1)]
    expected_lines, actual_lines = (read_metrics(place / "metrics.jsonl") for place in (reference, folder))
    assert [(line["step"], "loss" in line) for line in expected_lines] == [
        (line["step"], "loss" in line) for line in actual_lines
    ]
    for expected, actual in zip(expected_lines, actual_lines):
        for key in expected.keys() - TIMES - OF_ONE_RANK - {"report", "numbers", "step"}:
            assert actual[key] == pytest.approx(expected[key], rel=2e-6, abs=1e-9), (expected["step"], key)
    assert [line["mask_share"] for line in expected_lines if "loss" in line] == [
        line["mask_share"] for line in actual_lines if "loss" in line
    ]


if __name__ == "__main__":
    mode, place = sys.argv[1], Path(sys.argv[2])
    if mode == "steps":
        world = World.start("cpu")
        torch.save(run_steps(world, place, PARTS[1]), place / f"{world.rank}.pt")
        world.close()
    else:
        tiny(place, at=int(sys.argv[3]), rank=int(os.environ["RANK"]))

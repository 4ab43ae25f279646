"""Training loop: files, interruption, exact continuation."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch

from maskwise.distributed.world import World
from maskwise.engine import loop
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.run_log import RunLog, read_metrics
from maskwise.errors import UserError
from support import pair
from support.run_contents import untimed_lines
from support.tiny_method import Report, Stream, make_trainer


def knn(method):
    torch.randn(3)
    return Report({"top1": float(method.center.sum()), "draw": float(torch.rand(()))})


def run(
    folder,
    *,
    total=12,
    on_batch=lambda step: None,
    stream=None,
    loggers=(),
    save_every=5,
    world_trainer=None,
    evaluations=None,
    pictures=None,
    picture_interval=0,
    **intervals,
):
    trainer = world_trainer or make_trainer(total)
    run_log = RunLog(folder, total, quiet=True, loggers=loggers)
    result = loop.fit(
        trainer,
        stream or (lambda start: Stream(start, total, on_batch)),
        lambda batch: (batch.global_crops, batch.local_crops),
        run_log,
        Checkpoints(folder, encoder_spec={"name": "tiny"}),
        {"knn": knn} if evaluations is None else evaluations,
        loop.Intervals(log=2, save=save_every, evaluate=4, pictures=picture_interval, **intervals),
        pictures=pictures,
    )
    return result, trainer


def same_state(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first.tensors(), second.tensors())
    )


def interrupt(at, number):
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def test_run_writes_all_its_files(tmp_path):
    result, trainer = run(
        tmp_path,
        pictures=lambda method, batch: {"sheet": numpy.zeros((2, 2, 3), numpy.uint8)},
        picture_interval=8,
        loggers=("tensorboard",),
    )
    assert result == {"status": "complete", "step": 12, "skipped": 0}
    logged = untimed_lines(tmp_path)
    assert [line["step"] for line in logged if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in logged if "report" in line] == [4, 8, 12]
    assert {"epoch", "cls", "lr", "wd", "momentum", "skipped", "grad_norm"} <= logged[0].keys()
    assert logged[0]["lr"] == trainer.schedules.lr(1) and logged[0]["epoch"] == 0
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last", "step_00000010", "step_00000012"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["sheet_step_00000008.png", "sheet_step_00000012.png"]
    assert len(os.listdir(tmp_path / "reports")) == 3


def test_finished_run_returns_complete_without_training(tmp_path):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path, stream=lambda start: pytest.fail("work"))[0]["status"] == "complete"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_interrupted_and_resumed_run_equals_uninterrupted_run(tmp_path, number, at):
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    uninterrupted.mkdir(), interrupted.mkdir()
    _, expected = run(uninterrupted)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD)
    result, _ = run(interrupted, on_batch=interrupt(at, number))
    assert result == {"status": "preempted", "step": at + 1, "skipped": 0} and (interrupted / "preempted").exists()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD))
    result, resumed = run(interrupted)
    assert result["status"] == "complete" and not (interrupted / "preempted").exists()
    assert same_state(expected, resumed) and untimed_lines(uninterrupted) == untimed_lines(interrupted)


def test_run_resumes_exactly_after_a_crash(tmp_path):
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    uninterrupted.mkdir(), interrupted.mkdir()
    _, expected = run(uninterrupted)

    def crash(step):
        if step == 8:
            raise UserError("corrupt data")

    with pytest.raises(UserError, match="^corrupt data; saved after step 8, and the same command continues$"):
        run(interrupted, on_batch=crash)
    assert untimed_lines(interrupted)[-1]["step"] == 8
    assert (interrupted / "checkpoints" / "last").read_text().strip() == "step_00000008"
    assert not (interrupted / "preempted").exists()
    _, resumed = run(interrupted)
    assert same_state(expected, resumed) and untimed_lines(uninterrupted) == untimed_lines(interrupted)


def test_batches_that_end_before_the_first_step(tmp_path):
    def crash(step):
        raise UserError("corrupt data")

    with pytest.raises(UserError, match="^corrupt data; no step was done yet$"):
        run(tmp_path, on_batch=crash)
    assert not (tmp_path / "checkpoints").exists()


def test_an_interruption_in_the_last_step_still_completes(tmp_path):
    result, _ = run(tmp_path, on_batch=interrupt(11, signal.SIGTERM))
    assert (
        result["status"] == "complete"
        and untimed_lines(tmp_path)[-1]["report"] == "knn"
        and not (tmp_path / "preempted").exists()
    )


def test_the_second_ctrl_c_interrupts_at_once(tmp_path):
    def twice(step):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_batch=twice)


def test_evaluations_move_no_random_state(tmp_path):
    torch.manual_seed(1)
    trainer = make_trainer(4)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run(tmp_path, total=4, world_trainer=trainer)
    assert torch.equal(torch.rand(1), expected)


def test_run_with_a_damaged_checkpoint_resumes_from_the_previous_one(tmp_path):
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    uninterrupted.mkdir(), interrupted.mkdir()
    _, expected = run(uninterrupted)
    run(interrupted, on_batch=interrupt(7, signal.SIGTERM))
    (interrupted / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"x")
    _, resumed = run(interrupted)
    assert same_state(expected, resumed) and untimed_lines(uninterrupted) == untimed_lines(interrupted)


def test_persistently_non_finite_run_stops_with_one_line(tmp_path):
    trainer = make_trainer(12)
    before = {key: value.clone() for key, value in trainer.method.state_dict().items()}
    trainer.method.student.encoder.trunk.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="the last 4 steps had a non-finite loss or gradient") as caught:
        run(tmp_path, world_trainer=trainer, max_bad_steps=4)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in trainer.method.state_dict().items())
    assert [(line["kind"], line["alarm"][:7]) for line in untimed_lines(tmp_path) if "alarm" in line] == [
        ("skipped", "2 of 2 "),
        ("skipped", "4 of 4 "),
    ]
    bad = read_metrics(tmp_path / "bad_batches.jsonl")
    assert [(entry["step"], entry["causes"]) for entry in bad] == [(step, ["gradient"]) for step in (1, 2, 3, 4)]
    assert [entry["sample_ids"] for entry in bad] == [[list(range(step, step + 8))] for step in range(4)]
    assert str(tmp_path / "bad_batches.jsonl") in str(caught.value)


def test_skipped_steps_are_listed_once_across_interruptions(tmp_path):
    """Make steps 4, 6 and 8 non-finite; stop the run in step 7, or fail in step 9 after its checkpoint at 5."""
    expected = None
    for way in ("whole", "stopped", "broken"):
        folder = tmp_path / way
        folder.mkdir()
        for start in range(1 if way == "whole" else 2):
            trainer, step_of = make_trainer(12), {}
            poison = lambda crops: crops * (float("nan") if trainer.step_index in (4, 6, 8) else 1.0)  # noqa: E731
            trainer._floats, step_of["floats"] = (
                (lambda crops, floats=trainer._floats: poison(floats(crops))),
                trainer._floats,
            )

            def trouble(step):
                if start == 0 and way == "stopped" and step == 7:
                    signal.raise_signal(signal.SIGTERM)
                if start == 0 and way == "broken" and step == 9:
                    raise UserError("broken off")

            try:
                run(folder, world_trainer=trainer, on_batch=trouble)
            except UserError:
                assert way == "broken" and start == 0
        listed = (folder / "bad_batches.jsonl").read_text()
        expected = expected or listed
        assert [json.loads(line)["step"] for line in listed.splitlines()] == [5, 7, 9] and listed == expected, way
        assert json.loads(listed.splitlines()[0])["causes"] == ["loss", "gradient"]


def test_logged_line_with_non_finite_loss_is_valid_json(tmp_path):
    trainer = make_trainer(4)
    trainer._floats = lambda crops: crops * float("nan")
    run(tmp_path, total=4, world_trainer=trainer)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [line["loss"] for line in untimed_lines(tmp_path) if "loss" in line] == [None, None]


def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    for expected in ("preempted 4", "complete 12"):
        assert [out.strip() for out, _ in pair.end(pair.start(__file__, tmp_path))] == [expected] * 2
    assert [line["step"] for line in untimed_lines(tmp_path) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_training_works_in_a_thread_without_signal_handlers(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, total=2)[0]["status"]))
    thread.start(), thread.join()
    assert results == ["complete"]


def test_replaced_images_are_listed(tmp_path):
    stream = Stream(0, 4)
    stream.corrupt["bad.jpg"] = "truncated"
    run(tmp_path, total=4, stream=lambda start: stream)
    assert (tmp_path / "bad_images.txt").read_text() == "bad.jpg\ttruncated\n"


def run_rank(folder):
    world = World.start("cpu")
    first = not (folder / "checkpoints").exists()
    world.barrier()
    on_batch = interrupt(3, signal.SIGTERM) if first and world.rank == 1 else lambda step: None
    trainer = make_trainer(12, world=world)
    run_log = RunLog(folder, 12, quiet=True, loggers=(), main=world.is_main)
    result = loop.fit(
        trainer,
        lambda start: Stream(start, 12, on_batch),
        lambda batch: (batch.global_crops, batch.local_crops),
        run_log,
        Checkpoints(folder, world=world),
        {},
        loop.Intervals(log=2, save=5),
    )
    print(result["status"], result["step"])
    world.close()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))

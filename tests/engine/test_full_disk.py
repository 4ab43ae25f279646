"""Full, read-only and slow disks: the run continues, loses nothing and prints one line."""

import os
import time

import numpy
import pytest

from engine.test_loop import same_state
from maskwise.engine import loop
from maskwise.engine.append_file import AppendFile
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.run_log import RunLog
from maskwise.errors import UserError
from support.run_contents import untimed_lines
from support.small_disk import close, fill, free, mounted, reopen
from support.tiny_method import Report, Stream, make_trainer


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of half a MiB."""
    with mounted(tmp_path / "disk", "512k") as place:
        yield place


class Knn:
    """Evaluation that returns a report of one number."""

    def __call__(self, method):
        return Report({"top1": float(method.center.sum())})


def run(folder, on_batch=lambda step: None, total=24):
    folder.mkdir(exist_ok=True)
    trainer, messages = make_trainer(total), []
    run_log = RunLog(folder, total, quiet=True)
    run_log.print_line = messages.append
    picture = numpy.arange(300, dtype=numpy.uint8).reshape(10, 10, 3)
    try:
        result = loop.fit(
            trainer,
            lambda start: Stream(start, total, on_batch),
            lambda batch: (batch.global_crops, batch.local_crops),
            run_log,
            Checkpoints(folder, encoder_spec={"name": "tiny"}, print_line=messages.append),
            {"knn": Knn()},
            loop.Intervals(log=1, save=2, evaluate=4, pictures=4),
            pictures=lambda method, batch: {"sheet": picture},
        )
    except UserError as error:
        return str(error), trainer, messages
    return result["status"], trainer, messages


def files(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "tensorboard"
    )


@pytest.fixture
def reference_run(tmp_path):
    folder = tmp_path / "whole"
    status, trainer, messages = run(folder)
    assert status == "complete" and not [line for line in messages if "knn" not in line]
    return folder, trainer


def test_temporarily_full_disk_loses_nothing(reference_run, small_disk):
    folder = small_disk / "run"

    def at(step):
        if step == 3:
            fill(small_disk)
        if step == 20:
            free(small_disk)

    status, trainer, messages = run(folder, at)
    assert status == "complete" and same_state(trainer, reference_run[1])
    assert untimed_lines(folder) == untimed_lines(reference_run[0]) and files(folder) == files(reference_run[0])
    metrics, saves = (
        [line for line in messages if "metrics.jsonl" in line],
        [line for line in messages if "cannot write the checkpoint" in line],
    )
    assert metrics == [
        f"cannot write {folder}/metrics.jsonl (No space left on device): free some space; the data is kept in memory "
        "and written later",
        f"{folder}/metrics.jsonl is writable again, nothing is missing",
    ]
    assert [line.split("step_")[1] for line in saves] == [
        f"{step:08d} (No space left on device): free some space; the run continues and tries again at the next "
        "checkpoint"
        for step in range(4, 21, 2)
    ]
    assert curves(folder) == curves(reference_run[0])


def test_full_disk_at_the_end_is_an_error_and_the_same_command_continues(reference_run, small_disk):
    folder = small_disk / "run"
    status, _, _ = run(folder, lambda step: fill(small_disk) if step == 5 else None)
    assert status == (
        f"cannot write the checkpoint {folder}/checkpoints/step_00000024 (No space left on device): free some space, "
        "then start the same command again: it continues from the last checkpoint that was written"
    )
    assert not [name for name in files(folder) if "/." in name]
    status, _, _ = run(folder)  # still full
    assert "(No space left on device): free some space" in status and "\n" not in status
    assert sorted(os.listdir(folder / "checkpoints")) == ["last", "step_00000002", "step_00000004"]
    free(small_disk)
    status, trainer, _ = run(folder)
    assert status == "complete" and same_state(trainer, reference_run[1])
    assert untimed_lines(folder) == untimed_lines(reference_run[0]) and files(folder) == files(reference_run[0])


def test_read_only_checkpoints_are_reported_and_the_run_continues(reference_run, small_disk):
    folder = small_disk / "run"

    def at(step):
        if step == 3:
            close(folder / "checkpoints")
        if step == 9:
            reopen(folder / "checkpoints")

    status, trainer, messages = run(folder, at)
    assert status == "complete" and same_state(trainer, reference_run[1])
    assert untimed_lines(folder) == untimed_lines(reference_run[0]) and files(folder) == files(reference_run[0])
    refused = [line for line in messages if "cannot write" in line]
    assert len(refused) == 3 and all(
        "(Read-only file system): mount it writable again; the run continues" in line for line in refused
    )


def test_slow_disk_loses_nothing(reference_run, tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.01), fsync(handle)))
    status, trainer, messages = run(tmp_path / "run")
    assert (
        status == "complete"
        and same_state(trainer, reference_run[1])
        and untimed_lines(tmp_path / "run") == untimed_lines(reference_run[0])
    )
    assert files(tmp_path / "run") == files(reference_run[0]) and not [line for line in messages if "knn" not in line]


def test_append_file_resumes_after_failed_write(tmp_path, monkeypatch):
    messages = []
    file = AppendFile(tmp_path / "file", print_line=messages.append)
    file.write(b"one\n")
    raw, is_full = file.file, [True]

    class FullFile:
        """Writes two bytes of its argument, then none."""

        closed, fileno, close = False, raw.fileno, raw.close

        def write(self, data):
            if is_full[0] and len(data) < 4:
                raise OSError(28, "No space left on device")
            return raw.write(data[:2] if is_full[0] else data)

    file.file = FullFile()
    file.write(b"two\n")
    file.write(b"thr\n")
    assert file.unwritten and (tmp_path / "file").read_bytes() == b"one\ntwo\nthr\n"[: 12 - len(file.unwritten)]
    is_full[0] = False
    file.flush()
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\nthr\n" and not file.unwritten
    assert len(messages) == 2 and messages[0].startswith(
        f"cannot write {tmp_path / 'file'} (No space left on device): free some space; "
    )


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
        if tag in ("train/loss", "knn/top1")
    }

"""A disk that is full, closed or slow: the run goes on, loses nothing, and says one line."""

import os
import time

import numpy
import pytest
from engine.test_loop import Report, lines, same
from engine.tiny_method import Stream, trainer
from small_disk import close, fill, free, mounted, reopen

from maskwise.engine import loop
from maskwise.engine.appending import Appending
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.journal import Journal
from maskwise.functional.errors import UserError


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a MiB."""
    with mounted(tmp_path / "disk", "512k") as place:
        yield place


class Knn:
    """A report that is larger than nothing."""

    def __call__(self, method):
        return Report({"top1": float(method.center.sum())})


def run(folder, on_batch=lambda step: None, total=24):
    folder.mkdir(exist_ok=True)
    it, said = trainer(total), []
    journal = Journal(folder, total, quiet=True)
    journal.say = said.append
    picture = numpy.arange(300, dtype=numpy.uint8).reshape(10, 10, 3)
    try:
        result = loop.fit(
            it, lambda start: Stream(start, total, on_batch), lambda batch: (batch.global_crops, batch.local_crops), journal,
            Checkpoints(folder, encoder_spec={"name": "tiny"}, say=said.append), {"knn": Knn()}, log_every=1, save_every=2, evaluate_every=4,
            pictures=lambda method, batch: {"sheet": picture}, pictures_every=4,
        )  # fmt: skip
    except UserError as error:
        return str(error), it, said
    return result["status"], it, said


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard")


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    status, it, said = run(folder)
    assert status == "complete" and not [line for line in said if "knn" not in line]
    return folder, it


def test_a_disk_that_is_full_for_a_while_costs_nothing(whole, small_disk):
    folder = small_disk / "run"

    def at(step):
        if step == 3:
            fill(small_disk)
        if step == 20:
            free(small_disk)

    status, it, said = run(folder, at)
    assert status == "complete" and same(it, whole[1])
    assert lines(folder) == lines(whole[0]) and files(folder) == files(whole[0])
    metrics, saves = [line for line in said if "metrics.jsonl" in line], [line for line in said if "cannot write the checkpoint" in line]
    assert metrics == [
        f"cannot write {folder}/metrics.jsonl (No space left on device): free some space; what belongs there is kept in memory and written later",
        f"{folder}/metrics.jsonl is written again, nothing is missing",
    ]
    assert [line.split("step_")[1] for line in saves] == [
        f"{step:08d} (No space left on device): free some space; the run goes on and tries again at the next checkpoint" for step in range(4, 21, 2)
    ]
    assert curves(folder) == curves(whole[0])


def test_a_disk_that_stays_full_is_an_error_at_the_end_and_the_same_command_goes_on(whole, small_disk):
    folder = small_disk / "run"
    status, _, _ = run(folder, lambda step: fill(small_disk) if step == 5 else None)
    assert status == (
        f"cannot write the checkpoint {folder}/checkpoints/step_00000024 (No space left on device): free some space, "
        "then start the same command again: it goes on from the last checkpoint that was written"
    )
    assert not [name for name in files(folder) if "/." in name]
    status, _, _ = run(folder)  # still full
    assert "(No space left on device): free some space" in status and "\n" not in status
    assert sorted(os.listdir(folder / "checkpoints")) == ["last", "step_00000002", "step_00000004"]
    free(small_disk)
    status, it, _ = run(folder)
    assert status == "complete" and same(it, whole[1])
    assert lines(folder) == lines(whole[0]) and files(folder) == files(whole[0])


def test_checkpoints_that_become_read_only_are_told_and_the_run_goes_on(whole, small_disk):
    folder = small_disk / "run"

    def at(step):
        if step == 3:
            close(folder / "checkpoints")
        if step == 9:
            reopen(folder / "checkpoints")

    status, it, said = run(folder, at)
    assert status == "complete" and same(it, whole[1])
    assert lines(folder) == lines(whole[0]) and files(folder) == files(whole[0])
    refused = [line for line in said if "cannot write" in line]
    assert len(refused) == 3 and all("(Read-only file system): mount it writable again; the run goes on" in line for line in refused)


def test_a_slow_disk_loses_nothing(whole, tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.01), fsync(handle)))
    status, it, said = run(tmp_path / "run")
    assert status == "complete" and same(it, whole[1]) and lines(tmp_path / "run") == lines(whole[0])
    assert files(tmp_path / "run") == files(whole[0]) and not [line for line in said if "knn" not in line]


def test_an_appending_file_takes_up_where_the_disk_refused(tmp_path, monkeypatch):
    said = []
    file = Appending(tmp_path / "file", say=said.append)
    file.write(b"one\n")
    raw, full = file.file, [True]

    class Full:
        """Takes two bytes of what it is given, then none."""

        closed, fileno, close = False, raw.fileno, raw.close

        def write(self, data):
            if full[0] and len(data) < 4:
                raise OSError(28, "No space left on device")
            return raw.write(data[:2] if full[0] else data)

    file.file = Full()
    file.write(b"two\n")
    file.write(b"thr\n")
    assert file.owed and (tmp_path / "file").read_bytes() == b"one\ntwo\nthr\n"[: 12 - len(file.owed)]
    full[0] = False
    file.flush()
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\nthr\n" and not file.owed
    assert len(said) == 2 and said[0].startswith(f"cannot write {tmp_path / 'file'} (No space left on device): free some space; ")


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"] if tag in ("train/loss", "knn/top1")}

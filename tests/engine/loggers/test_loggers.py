"""Loggers: what each gets of a run and its restarts, and that none of them can end a run."""

import importlib.util

import numpy
import pytest

from maskwise import cli
from maskwise.engine import loggers
from maskwise.engine.run_log import RunLog, read_metrics
from support import recording_logger
from support.tiny_method import Report


@pytest.fixture
def recorded(monkeypatch):
    """Make each class of support/recording_logger a logger, and return the list of their calls."""
    for cls in ("Recording", "Rewinding", "FailsToOpen", "FailsInScalars", "FailsInClose"):
        monkeypatch.setitem(loggers.LOGGERS, cls, ("support.recording_logger", cls, "support"))
    monkeypatch.setattr(recording_logger.Recording, "calls", [])
    return recording_logger.Recording.calls


def start(folder, names, step, steps, total=8, kill=False, **options):
    """Log a start of a run: each step, and a picture and a report at step 4."""
    run_log = RunLog(folder, total, loggers=names, **options)
    run_log.open(step)
    for now in steps:
        run_log.count(now, 8)
        run_log.log_step(now, {"loss": now / 2, "epoch": 0})
        if now == 4:
            run_log.pictures(4, {"sheet": numpy.zeros((4, 5, 3), numpy.uint8)})
            run_log.report(4, "knn", Report({"top1": 30.5, "per_class": [1, 2], "good": True}))
    if not kill:
        run_log.close()


def steps_of(calls, kind="scalars"):
    return [call[1] for call in calls if call[0] == kind]


def test_a_logger_gets_numbers_pictures_and_reports(tmp_path, recorded):
    start(tmp_path, ("Recording",), 0, (4, 8), quiet=True)
    assert [call[:2] for call in recorded] == [
        ("open", 0),
        ("scalars", 4),
        ("picture", 4),
        ("scalars", 4),
        ("report", 4),
        ("scalars", 8),
        ("close", "complete"),
    ]
    names = [name for name, value in recorded[1][2:]]
    assert names == ["train/loss", "train/epoch", "train/img_s", "train/data_wait", "train/seconds"]
    assert recorded[2][2:] == ("sheet", b"\x89PNG") and recorded[4][2] == "knn_step_00000004.json"
    assert recorded[3][2:] == (("knn/top1", 30.5),)  # no list, no truth value


def test_steps_after_a_kill_are_logged_again_only_where_they_are_dropped(tmp_path, recorded):
    start(tmp_path, ("Recording",), 0, (2, 4, 5), kill=True, quiet=True)
    killed = len(recorded)
    start(tmp_path, ("Recording", "Rewinding"), 2, (4, 5, 6), quiet=True)
    again = recorded[killed:]
    assert steps_of(recorded[:killed]) == [2, 4, 4, 5]
    assert steps_of(again) == [4, 4, 5, 6, 6]  # all to one, the new one to both
    assert steps_of(again, "picture") == [4] and steps_of(again, "report") == [4]
    assert again[-2:] == [("close", "failed")] * 2


def test_a_report_that_a_kill_cut_off_is_logged_with_the_steps_around_it_left_out(tmp_path, recorded):
    start(tmp_path, ("Recording",), 0, (2, 4), kill=True, quiet=True)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))  # without the report's record
    killed = len(recorded)
    start(tmp_path, ("Recording",), 2, (4,), quiet=True)
    assert [call[:2] for call in recorded[killed:]] == [("open", 2), ("scalars", 4), ("report", 4), ("close", "failed")]


@pytest.mark.parametrize("name", ["FailsToOpen", "FailsInScalars", "FailsInClose"])
def test_a_logger_that_fails_prints_one_line_and_the_run_goes_on(tmp_path, recorded, capsys, name):
    start(tmp_path, (name, "Recording"), 0, (2, 4, 8))
    lines = [line for line in capsys.readouterr().err.splitlines() if "logger" in line]
    assert lines == [f"{name}: no route; the run continues without this logger until its next start"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 4, 8]
    assert ("close", "complete") in recorded


def test_other_ranks_open_no_logger(tmp_path, recorded):
    (tmp_path / "run").mkdir()
    start(tmp_path / "run", ("Recording",), 0, (2,), main=False)
    assert recorded == []


def test_interrupted_and_complete_runs_close_with_their_state(tmp_path, recorded):
    run_log = RunLog(tmp_path, 8, quiet=True, loggers=("Recording",))
    run_log.open(0)
    run_log.preempted(0)
    run_log.close()
    assert recorded[-1] == ("close", "preempted")


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name in ("wandb", "mlflow") else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    for names, rest in (("[tensorboard, mlflow]", "[tensorboard]"), ("[mlflow]", "null")):
        words = ["train", "debug/tiny", "--out", str(tmp_path / "run"), f"train.loggers={names}"]
        assert cli.main(words) == 2
        assert capsys.readouterr().err == (
            "maskwise: train.loggers: mlflow needs the package mlflow, which is not installed: "
            f"pip install 'maskwise[mlflow]', or train.loggers={rest}\n"
        )
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_and_none(capsys):
    assert cli.main(["show", "debug/tiny", "train.loggers=[comet]"]) == 2
    assert "train.loggers: expects a list of values (tensorboard or wandb or mlflow) or null" in capsys.readouterr().err
    assert cli.main(["show", "debug/tiny", "train.loggers=null"]) == 0

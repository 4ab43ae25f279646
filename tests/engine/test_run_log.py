"""Run log: lines, truncation on resume, progress text, folders."""

import json
import os
import sys

import numpy
import pytest

from maskwise.engine import run_log as module
from maskwise.engine.run_log import RunLog, prepare_folder, read_metrics
from maskwise.errors import UserError
from maskwise.process.progress import clock
from support.tiny_method import Report


def test_lines_reports_and_alarms(tmp_path):
    run_log = RunLog(tmp_path, 4, quiet=True)
    assert run_log.open(0) == []
    for step in (1, 2):
        with run_log.waiting():
            pass
        run_log.count(step, 8)
    line = run_log.log_step(2, {"loss": 5.0, "lr": 0.1})
    assert (
        list(line) == ["step", "loss", "lr", "img_s", "data_wait", "seconds"]
        and 0 <= line["data_wait"] <= 1
        and line["img_s"] > 0
    )
    run_log.report(2, "knn", Report({"top1": 30.5, "per_class": [1, 2]}))
    run_log.alarm(2, "kind", "odd")
    run_log.pictures(2, {"sheet": numpy.zeros((4, 5, 3), numpy.uint8)})
    run_log.unreadable({"b.jpg": "truncated"})
    run_log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[1:] == [
        {"step": 2, "report": "knn", "numbers": {"top1": 30.5, "per_class": [1, 2]}},
        {"step": 2, "alarm": "odd", "kind": "kind"},
    ]
    assert (tmp_path / "reports" / "knn_step_00000002.json").exists() and (
        tmp_path / "pictures" / "sheet_step_00000002.png"
    ).exists()
    assert os.listdir(tmp_path / "tensorboard")
    assert (tmp_path / "bad_images.txt").read_text() == "b.jpg\ttruncated\n"


def test_unreadable_images_are_listed_and_announced_once(tmp_path, capsys):
    listed = tmp_path / "bad_images.txt"
    listed.write_text("".join(f"a.jpg\tcannot identify image file <_io.BytesIO object at {k}>\n" for k in range(9)))
    for start in range(3):  # restarts, each with another reason
        run_log = RunLog(tmp_path, 8, loggers=())
        for check in range(2):
            run_log.unreadable({"a.jpg": f"reason {start}", "b\u2028\n\udcff.jpg": f"reason\n{start} {check}"})
    assert listed.read_bytes().decode() == (
        "a.jpg\tcannot identify image file <_io.BytesIO object at 8>\nb\\u2028\\n\\xff.jpg\treason\\n0 0\n"
    )
    assert capsys.readouterr().err == f"2 unreadable images were replaced by others: see {listed}\n"
    run_log.unreadable({"c.jpg": "gone"})
    assert len(listed.read_text(encoding="utf-8").splitlines()) == 3
    assert capsys.readouterr().err == f"3 unreadable images were replaced by others: see {listed}\n"


def test_a_folder_that_safetensors_could_not_open_is_refused(tmp_path):
    folder = tmp_path / "run\udcff"
    with pytest.raises(UserError, match=r"the name of the output folder .*run\\xff is not UTF-8"):
        prepare_folder(folder)
    assert not folder.exists()


def test_later_and_torn_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 6}\n{"st')
    run_log = RunLog(tmp_path, 8, quiet=True, loggers=())
    assert [line["step"] for line in run_log.open(4)] == [2, 4]
    run_log.log_step(6, {"loss": 2.0})
    run_log.close()
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]


def test_leftovers_of_a_kill_are_deleted(tmp_path):
    for name in ("reports/.knn_step_00000004.json.17", "pictures/.sheet_step_00000004.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("ha")
    (tmp_path / "preempted").write_text("4\n")
    run_log = RunLog(tmp_path, 8, quiet=True, loggers=())
    run_log.open(4)
    run_log.close()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "metrics.jsonl",
        "pictures",
        "reports",
    ]


def test_every_start_is_listed_with_its_first_step(tmp_path):
    (tmp_path / "run.json").write_text('{"precision": "fp32"}')
    for step, ranks in ((0, 1), (4, 2)):
        run_log = RunLog(tmp_path, 8, quiet=True, loggers=(), about={"ranks": ranks})
        run_log.open(step)
        run_log.close()
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "precision": "fp32",
        "starts": [{"step": 0, "ranks": 1}, {"step": 4, "ranks": 2}],
    }


def test_tensorboard_drops_steps_after_the_checkpoint_also_without_one_and_with_a_clock_set_back(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from maskwise.engine.loggers import tensorboard as tensorboard_file

    for now, step, values in ((2000000000.5, 0, (1.0, 2.0)), (1999999999.0, 0, (3.0, 4.0)), (5.0, 2, (5.0,))):
        monkeypatch.setattr(tensorboard_file.time, "time", lambda: now)
        run_log = RunLog(tmp_path, 8, quiet=True)
        run_log.open(step)
        for add, value in enumerate(values):
            run_log.log_step(step + 2 * (add + 1), {"loss": value})
        run_log.metrics.file.close()  # killed: nothing is flushed
    newest = max((tmp_path / "tensorboard").iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])  # the last record is torn
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(2, 3.0), (4, 5.0)]


def test_quiet_and_other_ranks_print_nothing(tmp_path, capsys):
    for options in ({"quiet": True}, {"main": False}):
        run_log = (
            RunLog(tmp_path / "run", 2, **options)
            if options.get("main", True) is False
            else RunLog(tmp_path, 2, **options)
        )
        run_log.open(0)
        run_log.log_step(2, {"loss": 1.0})
        run_log.print_line("hello")
        run_log.preempted(2)
        run_log.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_plain_progress_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    run_log = RunLog(tmp_path, 400, loggers=())
    run_log.open(0)
    for step in range(1, 25):
        now[0] += 1.0
        run_log.count(step, 312)
        if step % 4 == 0:
            run_log.log_step(step, {"loss": 5.1})
    run_log.close()
    text = capsys.readouterr().err
    assert "\r" not in text and text.splitlines() == [
        "step 4/400  loss 5.1  312 img/s  data 0%  eta 6:36",
        "step 16/400  loss 5.1  312 img/s  data 0%  eta 6:24",
    ]


def test_slow_rate_is_not_shown_as_zero(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    run_log = RunLog(tmp_path, 4, loggers=())
    run_log.open(0)
    now[0] += 25.0
    run_log.count(1, 8)
    run_log.log_step(1, {"loss": 5.1})
    run_log.close()
    assert "  0.32 img/s  " in capsys.readouterr().err


def test_terminal_shows_one_bar_and_lines_above_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run_log = RunLog(tmp_path, 4, loggers=())
    run_log.open(0)
    run_log.count(1, 8)
    run_log.print_line("knn at step 1: top1 30")
    run_log.log_step(4, {"loss": 5.1})
    run_log.close()
    text = capsys.readouterr().err
    assert (
        text.startswith("step 1/4  loss nan")
        and "\rknn at step 1: top1 30\nstep" in text
        and text.endswith("\n")
        and text.count("\n") == 2
    )


def test_bar_fits_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(module.streams, "columns", lambda stream: 20)
    run_log = RunLog(tmp_path, 4, loggers=())
    run_log.open(0)
    run_log.count(1, 8)
    run_log.print_line("line")
    run_log.close()
    assert capsys.readouterr().err == "step 1/4  loss nan " + "\r" + 19 * " " + "\r" + "line\n"


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl"])
def test_file_that_cannot_be_opened_is_a_one_line_error(tmp_path, name):
    """A file in place of the folder, a folder in place of the file."""
    path = tmp_path / name
    path.touch() if name == "tensorboard" else path.mkdir()
    remedy = "a file has the name of a folder here" if name == "tensorboard" else "a folder has the name of this file"
    with pytest.raises(UserError) as caught:
        RunLog(tmp_path, 4, quiet=True).open(0)
    cause = "File exists" if name == "tensorboard" else "Is a directory"
    assert str(caught.value) == (
        f"cannot write {path} ({cause}): {remedy}, move it away, then start the same command again"
    )


def test_clock():
    assert [clock(seconds) for seconds in (5, 130, 3730)] == ["0:05", "2:10", "1:02:10"]


def test_unwritable_folder_is_a_one_line_error(tmp_path):
    assert prepare_folder(tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        prepare_folder(tmp_path / "file" / "run")
    run = tmp_path / "file" / "run"
    message = f"cannot write into the output folder {run} (Not a directory): choose another with --out"
    assert str(caught.value) == message


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes anywhere")
def test_read_only_folder_is_a_one_line_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied\): choose another with --out"):
        prepare_folder(tmp_path)
    tmp_path.chmod(0o700)


def test_metrics_of_earlier_versions_are_read_under_current_names(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "feature_twins": 0.5, "center_move": 0.25}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.0, "feature_duplicates": 0.5, "center_shift": 0.25}
    ]

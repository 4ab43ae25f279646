"""The journal: lines, cutting, progress text, folders."""

import dataclasses
import json
import os

import numpy
import pytest

from maskwise.engine import journal as module
from maskwise.engine.journal import Journal, clock, prepare_folder, read_metrics
from maskwise.functional.errors import UserError


@dataclasses.dataclass
class Report:
    numbers: dict

    def save(self, path):
        path.write_text(json.dumps(self.numbers))


def test_lines_reports_and_alarms(tmp_path):
    journal = Journal(tmp_path, 4, quiet=True)
    assert journal.open(0) == []
    for step in (1, 2):
        with journal.waiting():
            pass
        journal.count(step, 8)
    line = journal.line(2, {"loss": 5.0, "lr": 0.1})
    assert list(line) == ["step", "loss", "lr", "img_s", "data_wait", "seconds"] and 0 <= line["data_wait"] <= 1 and line["img_s"] > 0
    journal.report(2, "knn", Report({"top1": 30.5, "per_class": [1, 2]}))
    journal.alarm(2, "kind", "odd")
    journal.pictures(2, {"sheet": numpy.zeros((4, 5, 3), numpy.uint8)})
    journal.unreadable({"b.jpg": "truncated"})
    journal.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[1:] == [{"step": 2, "report": "knn", "numbers": {"top1": 30.5, "per_class": [1, 2]}}, {"step": 2, "alarm": "odd", "kind": "kind"}]
    assert (tmp_path / "reports" / "knn_step_00000002.json").exists() and (tmp_path / "pictures" / "sheet_step_00000002.png").exists()
    assert os.listdir(tmp_path / "tensorboard")
    assert (tmp_path / "bad_images.txt").read_text() == "b.jpg\ttruncated\n"


def test_later_and_torn_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 6}\n{"st')
    journal = Journal(tmp_path, 8, quiet=True, tensorboard=False)
    assert [line["step"] for line in journal.open(4)] == [2, 4]
    journal.line(6, {"loss": 2.0})
    journal.close()
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]


def test_what_a_kill_left_beside_the_lines_is_swept(tmp_path):
    for name in ("reports/.knn_step_00000004.json.17", "pictures/.sheet_step_00000004.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("ha")
    (tmp_path / "preempted").write_text("4\n")
    journal = Journal(tmp_path, 8, quiet=True, tensorboard=False)
    journal.open(4)
    journal.close()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["metrics.jsonl", "pictures", "reports"]


def test_every_start_is_listed_with_its_first_step(tmp_path):
    (tmp_path / "run.json").write_text('{"precision": "fp32"}')
    for step, ranks in ((0, 1), (4, 2)):
        journal = Journal(tmp_path, 8, quiet=True, tensorboard=False, about={"ranks": ranks})
        journal.open(step)
        journal.close()
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "precision": "fp32", "starts": [{"step": 0, "ranks": 1}, {"step": 4, "ranks": 2}],
    }


def test_tensorboard_forgets_what_comes_after_the_checkpoint_also_when_there_is_none_and_the_clock_goes_back(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from maskwise.engine import event_file

    for clock, step, values in ((2000000000.5, 0, (1.0, 2.0)), (1999999999.0, 0, (3.0, 4.0)), (5.0, 2, (5.0,))):
        monkeypatch.setattr(event_file.time, "time", lambda: clock)
        journal = Journal(tmp_path, 8, quiet=True)
        journal.open(step)
        for add, value in enumerate(values):
            journal.line(step + 2 * (add + 1), {"loss": value})
        journal.metrics.file.close()  # killed: nothing is flushed
    newest = max((tmp_path / "tensorboard").iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])  # the last record is torn
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(2, 3.0), (4, 5.0)]


def test_quiet_and_other_ranks_say_nothing(tmp_path, capsys):
    for options in ({"quiet": True}, {"main": False}):
        journal = Journal(tmp_path / "run", 2, **options) if options.get("main", True) is False else Journal(tmp_path, 2, **options)
        journal.open(0)
        journal.line(2, {"loss": 1.0})
        journal.say("hello")
        journal.preempted(2)
        journal.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_a_plain_line_now_and_then(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    journal = Journal(tmp_path, 400, tensorboard=False)
    journal.open(0)
    for step in range(1, 25):
        now[0] += 1.0
        journal.count(step, 312)
        if step % 4 == 0:
            journal.line(step, {"loss": 5.1})
    journal.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 4/400  loss 5.1  312 img/s  data 0%  eta 6:36",
        "step 16/400  loss 5.1  312 img/s  data 0%  eta 6:24",
    ]


def test_a_slow_rate_is_not_shown_as_none(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    journal = Journal(tmp_path, 4, tensorboard=False)
    journal.open(0)
    now[0] += 25.0
    journal.count(1, 8)
    journal.line(1, {"loss": 5.1})
    journal.close()
    assert "  0.32 img/s  " in capsys.readouterr().err


def test_a_terminal_gets_one_bar_and_lines_above_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    journal = Journal(tmp_path, 4, tensorboard=False)
    journal.open(0)
    journal.count(1, 8)
    journal.say("knn at step 1: top1 30")
    journal.line(4, {"loss": 5.1})
    journal.close()
    text = capsys.readouterr().err
    assert text.startswith("step 1/4  loss nan") and "\rknn at step 1: top1 30\nstep" in text and text.endswith("\n") and text.count("\n") == 2


def test_clock():
    assert [clock(seconds) for seconds in (5, 130, 3730)] == ["0:05", "2:10", "1:02:10"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    assert prepare_folder(tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        prepare_folder(tmp_path / "file" / "run")
    assert str(caught.value) == f"cannot write into the output folder {tmp_path / 'file' / 'run'} (Not a directory): choose another with --out"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied\): choose another with --out"):
        prepare_folder(tmp_path)
    tmp_path.chmod(0o700)

"""`maskwise runs`: states by files, lock and heartbeat; rows, sorting, filters, comparison."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from maskwise import build, cli
from maskwise.build import runs
from maskwise.engine.run_lock import RunLock, holder
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

SMALL = ["data.count=16", "teacher.warmup_temp_epochs=1", "evaluate.limit_bank=null", "train.epochs=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two complete runs of two steps, made through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "debug/tiny", "--out", str(folder / "a"), *SMALL]) == 0
    words = ["optimizer.lr=1e-3", "masking.ratio=0.2", "evaluate.knn_first=true", *SMALL]
    assert cli.main(["train", "debug/tiny", "--out", str(folder / "deep" / "b"), *words]) == 0
    return folder


def run_folder(folder, **files):
    """A run folder of 16 images in two steps of 8, with further files; nothing trained it."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe("debug/tiny", *SMALL)
    (folder / "recipe.yaml").write_text(recipe.resolved_yaml())
    start = {"ranks": 2, "device": "2 CPU cores", "commit": "abc123"}
    about = {"images": 16, "started": "2026-01-02T03:04:05", "starts": [start], **start, "command": "maskwise train x"}
    (folder / "run.json").write_text(json.dumps(about))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


LINES = [
    {"step": 0, "report": "knn", "numbers": {"top1": 12.5}},
    {"step": 1, "loss": 5.0, "img_s": 10.0, "seconds": 900.0},
    {"step": 1, "alarm": "flat", "kind": "loss_plateau"},
    {"step": 1, "alarm": "flat again", "kind": "loss_plateau"},
    {"step": 2, "loss": 4.0, "img_s": 30.0, "seconds": 1800.0},
    {"step": 2, "report": "knn", "numbers": {"top1": 40.0}},
]


def test_a_row_by_hand(tmp_path):
    folder = run_folder(tmp_path / "r", **{"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in LINES)})
    (folder / "reports").mkdir()
    numbers = {"knn_untrained_pooled": 11.0, "knn_pixels": 20.0, "knn_chance": 12.5, "knn_teacher_pooled": 39.0}
    (folder / "reports" / "run_report.json").write_text(json.dumps({"numbers": numbers}))
    numbers = {"pixels_top1_k10": 19.0, "pixels_top1_k20": 20.5, "untrained_pooled_top1_k20": 10.0, "chance": 12.5}
    (folder / "reports" / "baselines.json").write_text(json.dumps({"numbers": numbers}))
    row = runs.read_run_folder(folder).row()
    expected = {
        "state": "failed",
        "note": "killed, or never started to train",
        "step": 2,
        "steps": 2,
        "epoch": 1.0,
        "epochs": 1,
        "loss": 4.0,
        "knn": 40.0,
        "knn_step": 2,
        "baselines": {"knn_first": 12.5, "knn_untrained_pooled": 11.0, "knn_pixels": 20.0, "knn_chance": 12.5}
        | {"pixels_top1_k20": 20.5, "untrained_pooled_top1_k20": 10.0, "chance": 12.5},
        "alarms": ["loss_plateau"],
        "img_s": 20.0,
        "hours": 1.0,  # 1800 s on two ranks
        "ranks": 2,
        "commit": "abc123",
        "started": "2026-01-02T03:04:05",
    }
    assert {key: row[key] for key in expected} == expected


def test_states_by_files(tmp_path):
    states = {}
    run_folder(tmp_path / "preempted", preempted="1\n")
    run_folder(tmp_path / "failed", failed="the disk is full\n")
    (run_folder(tmp_path / "complete") / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run_folder(tmp_path / "short") / "checkpoints" / "step_00000001").mkdir(parents=True)
    for folder in runs.find_runs(tmp_path):
        run = runs.read_run_folder(folder)
        states[folder.name] = (run.state, run.note)
    assert states == {
        "preempted": ("preempted", "the same command continues"),
        "failed": ("failed", "the disk is full"),
        "complete": ("complete", ""),
        "short": ("failed", "killed, or never started to train"),
    }


def test_running_while_the_lock_is_held_and_failed_after_a_kill(tmp_path):
    folder = run_folder(tmp_path / "r", preempted="1\n")
    code = (
        f"from maskwise.engine.run_lock import RunLock; lock = RunLock({str(folder)!r}); lock.acquire(); "
        "print('held', flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    state, note = runs.state_of(folder, 2)
    assert state == "running" and f"pid {process.pid} on " in note
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert runs.state_of(folder, 2)[0] == "preempted"  # it was saved before
    (folder / "preempted").unlink()
    state, note = runs.state_of(folder, 2)
    assert state == "failed" and note == f"killed (pid {process.pid} on {os.uname().nodename})"


def test_another_machine_counts_by_its_heartbeat(tmp_path):
    folder = run_folder(tmp_path / "r", **{".lock": "pid 7 on elsewhere\n"})
    assert holder(folder).alive is None
    for minutes, state, note in ((0, "running", "pid 7 on elsewhere"), (10, "running", "last sign 10 min ago")):
        os.utime(folder / ".lock", (time.time() - 60 * minutes,) * 2)
        found = runs.state_of(folder, 2)
        assert found[0] == state and note in found[1]
    os.utime(folder / ".lock", (time.time() - 3600,) * 2)
    assert runs.state_of(folder, 2) == ("failed", "killed (pid 7 on elsewhere)")


def test_the_heartbeat_is_renewed_while_steps_are_done(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:
        lock.acquire()
        for beat, expected in ((0.0, True), (1e9, False)):  # seconds since the last one that are required
            os.utime(tmp_path / ".lock", (1000, 1000))
            monkeypatch.setattr("maskwise.engine.run_lock.BEAT", beat)
            lock.beat()
            assert (holder(tmp_path).silent < 60) == expected
    assert holder(tmp_path) is None


def test_an_error_is_left_in_the_folder_and_removed_by_the_next_start(tmp_path):
    out, words = tmp_path / "r", ["debug/tiny", *SMALL, "data.count=32"]
    recipe = read_recipe(*words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskwise.engine.loop.log_step", lambda *a: (_ for _ in ()).throw(UserError("no more of this")))
        with pytest.raises(UserError):
            build.train(recipe, out=out, quiet=True)
    assert runs.read_run_folder(out).state == "failed" and runs.read_run_folder(out).note == "no more of this"
    build.train(recipe, out=out, quiet=True)
    assert runs.read_run_folder(out).state == "complete" and not (out / "failed").exists()


def test_table_of_real_runs(made, capsys):
    assert cli.main(["runs", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "run",
        "state",
        "step",
        "epoch",
        "loss",
        "k-NN",
        "alarms",
        "img/s",
        "cost",
        "commit",
        "recipe",
    ]
    assert "optimizer.lr=" in "\n".join(lines) and lines[-1] == "2 runs: 2 complete"
    assert cli.main(["runs", str(made), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], first["step"], first["steps"], first["parent"]) == ("complete", 2, 2, "debug/tiny")
    assert second["changes"]["optimizer.lr"] == ["0.016", "0.001"] and "knn_first" in second["baselines"]
    assert set(second["changes"]) - set(first["changes"]) == {"optimizer.lr", "masking.ratio", "evaluate.knn_first"}


def test_sorting_and_filters(made, capsys, tmp_path):
    found = [runs.read_run_folder(path) for path in runs.find_runs(made)]
    names = lambda chosen: [os.path.basename(run.path) for run in chosen]  # noqa: E731
    assert names(runs.sorted_runs(found, "optimizer.lr")) == ["b", "a"]
    assert names(runs.sorted_runs(found, "-optimizer.lr")) == ["a", "b"]
    assert names(runs.sorted_runs(found, "-knn_first")) == ["b", "a"]  # runs without one come last
    for condition, expected in (
        ("state=complete", ["a", "b"]),
        ("state!=complete", []),
        ("optimizer.lr<0.002", ["b"]),
        ("optimizer.lr>=0.016", ["a"]),
        ("masking.ratio=0.20", ["b"]),
        ("masking.name=attmask_hint", ["a", "b"]),
    ):
        assert names(runs.filtered(found, [condition])) == expected, condition
    for wrong, message in (
        (["--where", "optimizer.rl=1"], "no run has optimizer.rl; did you mean `optimizer.lr`?"),
        (["--where", "state"], "write KEY=VALUE"),
        (["--where", "loss<low"], "'low' is no number"),
        (["--sort", "speedy"], "no run has speedy"),
        (["--csv", "no/x.csv"], "its folder does not exist"),
        (["--picture", "x.png"], "--picture draws two runs"),
    ):
        assert cli.main(["runs", str(made), *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert cli.main(["runs", str(tmp_path)]) == 2 and "holds no runs" in capsys.readouterr().err
    assert cli.main(["runs", str(made), "--csv", str(tmp_path / "x.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * 2 and json.loads(rows[1]["changes"])["optimizer.lr"]


def test_two_runs_are_compared(made, capsys, tmp_path):
    picture = tmp_path / "both.png"
    assert cli.main(["runs", str(made / "a"), str(made / "deep" / "b"), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    for line in ("3 values of the recipes differ", f"curves: {picture}"):
        assert line in text
    assert [line.split() for line in text.splitlines() if line.startswith("masking.ratio")] == [
        ["masking.ratio", "0.3", "0.2"]
    ]
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (960, 4 * 540)  # loss, CLS, patches, k-NN
    assert cli.main(["runs", str(made / "a"), str(made / "a"), "--picture", str(picture)]) == 0
    assert "the recipes are equal" in capsys.readouterr().out
    assert cli.main(["runs", str(made / "a"), str(made / "deep" / "b"), "--sort", "knn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

"""A full and a read-only disk, as the person at the keyboard meets them."""

import numpy as np
import pytest
import torch

from maskwise import cli
from maskwise.engine.trainer import Trainer
from maskwise.imaging.drawing import write_png
from support import kills
from support.small_disk import close, fill, free, mounted, reopen


@pytest.fixture
def disk(tmp_path):
    """Mount six MiB; yields a function that trains debug/tiny there: (exit status, lines of standard error)."""
    with mounted(tmp_path / "disk", "6m") as place:
        yield place


@pytest.fixture
def train(disk, capfd):
    def run_training(out=disk / "run"):
        capfd.readouterr()
        torch.set_num_threads(1)
        status = cli.main(["train", "debug/tiny", "--out", str(out), *kills.SMALL])
        return status, capfd.readouterr().err.splitlines()

    return run_training


def test_disk_full_from_the_start_is_a_one_line_error(disk, train):
    fill(disk)
    status, messages = train()
    assert status == 2 and messages == [
        f"maskwise: cannot write {disk}/run/run.json (No space left on device): free some space"
    ]
    assert not [path for path in disk.rglob("*") if path.is_file() and path.name != "ballast"]


def test_read_only_disk_is_a_one_line_error(disk, train):
    close(disk)
    try:
        status, messages = train()
    finally:
        reopen(disk)
    assert (status, messages) == (
        2,
        [
            f"maskwise: cannot write into the output folder {disk}/run (Read-only file system): choose another with "
            "--out"
        ],
    )


@pytest.mark.slow
def test_temporarily_full_disk_gives_the_same_run(disk, train, tmp_path, monkeypatch):
    step = Trainer.step

    def filling(trainer, *arguments, **options):
        if trainer.step_index == 5:
            fill(disk)
        return step(trainer, *arguments, **options)

    assert train(tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", filling)
        status, messages = train()
    assert status == 2 and "Traceback" not in "\n".join(messages)
    line = f"cannot write the checkpoint {disk}/run/checkpoints/step_%08d (No space left on device): free some space"
    assert [text for text in messages if "the checkpoint" in text] == [
        *(f"{line % at}; the run continues and tries again at the next checkpoint" for at in (6, 8, 10)),
        f"maskwise: {line % 12}, then start the same command again: it continues from the last checkpoint that was "
        "written",
    ]
    status, messages = train()
    assert status == 2 and len(messages) <= 3 and "(No space left on device): free some space" in messages[-1]
    free(disk)
    assert train()[0] == 0
    kills.assert_same(kills.content(tmp_path / "whole"), disk / "run")


@pytest.fixture
def small_run(disk, tmp_path, capfd):
    """A finished run on the small disk, and a folder of labeled images beside it."""
    small = ("data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.knn_every=0")
    assert cli.main(["train", "debug/tiny", "--out", str(disk / "run"), *small]) == 0
    for number in range(8):
        path = tmp_path / "images" / ("train", "val")[number // 4] / "ab"[number % 2] / f"{number}.png"
        write_png(path, np.full((40, 40, 3), 30 * number, np.uint8))
    capfd.readouterr()
    return disk / "run"


def test_results_on_a_full_disk_are_printed_or_refused_in_one_line(disk, small_run, tmp_path, capfd):
    """A full run folder loses no result; what was to be written is named, and nothing is half-written."""
    images, files = tmp_path / "images", set(disk.rglob("*"))
    free_space = "(No space left on device): free some space"
    fill(disk)
    words = [f"train={images}/train", f"test={images}/val"]
    assert cli.main(["evaluate", "knn", str(small_run), *words, "k=[1]"]) == 0
    output, error = capfd.readouterr()
    line = f"cannot write the report {small_run}/reports/knn.json {free_space}; the report is not saved there\n"
    assert output.startswith("top1 ") and error == line
    assert cli.main(["report", str(small_run), "--measure", "--out", str(tmp_path / "page.html")]) == 0
    output, error = capfd.readouterr()
    assert "k-NN" in output and error.count("\n") == 1 and error.endswith("; the report is not saved there\n")
    for command, what in (
        (["report", str(small_run)], "report.html"),
        (["export", str(small_run), "--to", f"{disk}/out"], f"{disk}/out"),
        (["convert", str(small_run), "--to", f"{disk}/x.safetensors", "--layout", "ibot", "--weights", "teacher"], "x"),
        (["evaluate", "knn", str(small_run), *words, f"cache={disk}/cache"], f"the feature cache {disk}/cache"),
        (
            ["evaluate", "linear", str(small_run), *words, "epochs=1", "feature=pooled", f"save={disk}/p.safetensors"],
            "the probe",
        ),
    ):
        assert cli.main(command) == 2, command
        _, error = capfd.readouterr()
        last = error.splitlines()[-1]
        assert last.startswith("maskwise: cannot write ") and what in last and "No space left on device" in last, error
        assert "Traceback" not in error
    left = {path for path in disk.rglob("*") if path.is_file()} - files - {disk / "ballast"}
    assert not {path for path in left if "cache" not in path.parts}

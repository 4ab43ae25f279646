"""A full and a read-only disk, as the person at the keyboard meets them."""

import kills
import pytest
import torch
from small_disk import close, fill, free, mounted, reopen

from maskwise import cli
from maskwise.engine.trainer import Trainer


@pytest.fixture
def disk(tmp_path):
    """A file system of six MiB, and `train` of debug/tiny into its folder `run`: (exit status, lines of standard error)."""
    with mounted(tmp_path / "disk", "6m") as place:
        yield place


@pytest.fixture
def train(disk, capfd):
    def of(out=disk / "run"):
        capfd.readouterr()
        torch.set_num_threads(1)
        status = cli.main(["train", "debug/tiny", "--out", str(out), *kills.SMALL])
        return status, capfd.readouterr().err.splitlines()

    return of


def test_a_disk_that_is_full_from_the_start_is_one_line(disk, train):
    fill(disk)
    status, said = train()
    assert status == 2 and said == [f"maskwise: cannot write {disk}/run/run.json (No space left on device): free some space"]
    assert not [path for path in disk.rglob("*") if path.is_file() and path.name != "ballast"]


def test_a_read_only_disk_is_one_line(disk, train):
    close(disk)
    try:
        status, said = train()
    finally:
        reopen(disk)
    assert (status, said) == (2, [f"maskwise: cannot write into the output folder {disk}/run (Read-only file system): choose another with --out"])


@pytest.mark.slow
def test_a_disk_that_fills_up_and_is_emptied_gives_the_same_run(disk, train, tmp_path, monkeypatch):
    step = Trainer.step

    def filling(trainer, *arguments, **options):
        if trainer.step_index == 5:
            fill(disk)
        return step(trainer, *arguments, **options)

    assert train(tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", filling)
        status, said = train()
    assert status == 2 and "Traceback" not in "\n".join(said)
    line = f"cannot write the checkpoint {disk}/run/checkpoints/step_%08d (No space left on device): free some space"
    assert [text for text in said if "the checkpoint" in text] == [
        *(f"{line % at}; the run goes on and tries again at the next checkpoint" for at in (6, 8, 10)),
        f"maskwise: {line % 12}, then start the same command again: it goes on from the last checkpoint that was written",
    ]
    status, said = train()
    assert status == 2 and len(said) <= 3 and "(No space left on device): free some space" in said[-1]
    free(disk)
    assert train()[0] == 0
    kills.same(kills.content(tmp_path / "whole"), disk / "run")

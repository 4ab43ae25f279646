"""Runs that are extended: equal to the longer run where schedules agree, a jump in one line where they do not."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskwise import build, cli
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from support import pair

# 3 steps per epoch
SMALL = ("data.count=24", "crops.local_number=0", "backbone.depth=1", "train.log_every=1", "optimizer.warmup_epochs=1")
SMALL = (*SMALL, "evaluate.knn_every=0", "evaluate.pictures_every=0", "teacher.warmup_temp_epochs=2")
WSD = ("optimizer.schedule=wsd",)
TIMES = {"img_s", "data_wait", "seconds"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, with one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def train(out, *overrides):
    return build.train(read_recipe("debug/tiny", *SMALL, *overrides), out=out, quiet=True)


def stop_at(step, monkeypatch, start):
    """Call `start`, and ask the run to stop during this step."""
    original = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert start()["status"] == "preempted"


def records(out):
    lines = [line for line in read_metrics(Path(out) / "metrics.jsonl") if "loss" in line]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def last(out):
    folder = Path(out) / "checkpoints"
    return folder / (folder / "last").read_text().strip()


def equal(one, two):
    """Whether two runs ended in the same state after the same records."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        here, there = load_file(last(one) / file), load_file(last(two) / file)
        assert here.keys() == there.keys()
        if not all(torch.equal(value, there[key]) for key, value in here.items()):
            return False
    return last(one).name == last(two).name and records(one) == records(two)


def contents(out):
    return {path: path.read_bytes() for path in sorted(Path(out).rglob("*")) if path.is_file()}


def test_a_complete_wsd_run_goes_on_from_before_its_decay_and_equals_the_longer_run(capfd, monkeypatch):
    train("short", "train.epochs=5", "train.keep=1", *WSD)
    assert [path.name for path in sorted(Path("short/checkpoints").glob("step_*"))] == [
        "step_00000012",
        "step_00000015",
    ]
    train("long", "train.epochs=10", *WSD)
    before = contents("short")
    capfd.readouterr()
    assert cli.main(["train", "short", "--epochs", "10", "--out", "longer"]) == 0
    out, err = capfd.readouterr()
    assert out == "complete: 30 steps in longer\n"
    line = next(line for line in err.splitlines() if line.startswith("extends"))
    assert line == (
        "extends short from step 12 (wsd, 5 epochs -> wsd, 10 epochs): up to this step the schedules are those of the "
        "longer run; the steps 13 to 15, with its decay, are trained again"
    )
    assert contents("short") == before
    assert equal("longer", "long") and records("longer")[13]["lr"] == records("longer")[5]["lr"]
    assert not equal("longer", "short")
    about = json.loads(Path("longer/run.json").read_text())
    assert about["extends"]["run"] == "short" and about["extends"]["step"] == 12 == about["starts"][0]["step"]

    # the extension is a run like any other: it resumes, by its command and by its own folder
    stop_at(20, monkeypatch, lambda: build.extend("short", "again", epochs=10, quiet=True))
    assert last("again").name == "step_00000021"
    assert cli.main(["train", "short", "--epochs", "10", "--out", "again"]) == 0
    assert equal("again", "long")


def test_a_stopped_run_of_steps_goes_on_before_its_decay(monkeypatch):
    constant = ("optimizer.schedule=constant", "train.steps=12")
    stop_at(4, monkeypatch, lambda: train("short", *constant))
    train("long", "train.steps=10", "optimizer.schedule=wsd", "optimizer.decay_share=0.4")
    more = ("optimizer.schedule=wsd", "optimizer.decay_share=0.4")
    build.extend("short", "longer", *more, steps=10, quiet=True)
    assert equal("longer", "long") and records("long")[-1]["lr"] < records("long")[5]["lr"] == records("long")[6]["lr"]


def test_a_cosine_run_jumps_to_the_longer_cosine_and_says_so(capfd):
    train("short", "train.epochs=3")
    before = contents("short")
    train("long", "train.epochs=6")
    capfd.readouterr()
    assert cli.main(["train", "short", "--epochs", "6", "--out", "longer"]) == 0
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("extends"))
    long = records("long")
    assert line == (
        "extends short from step 9 (cosine, 3 epochs -> cosine, 6 epochs): jumps to the schedule of the longer run, "
        f"learning rate 1e-06 -> {long[9]['lr']:.4g}, weight decay 0.4 -> {long[9]['wd']:.4g}, "
        f"momentum 1 -> {long[9]['momentum']:.4g}"
    )
    assert contents("short") == before
    rates = [[line[key] for key in ("lr", "wd", "momentum")] for line in records("longer")]
    assert rates[9:] == [[line[key] for key in ("lr", "wd", "momentum")] for line in long[9:]]
    assert records("longer")[:9] == records("short") != long[:9]


@pytest.mark.slow
def test_two_ranks_extend_as_one():
    train("short", "train.epochs=3", "data.count=16", *WSD)
    build.extend("short", "one", epochs=5, quiet=True)
    pair.end(pair.start(__file__, "short", "two"))
    assert [start["ranks"] for start in json.loads(Path("two/run.json").read_text())["starts"]] == [2]
    for here, there in zip(records("one"), records("two"), strict=True):
        assert here["lr"] == there["lr"] and here["loss"] == pytest.approx(there["loss"], rel=2e-6)


def test_mistakes_are_one_line_and_nothing_is_written(monkeypatch):
    train("short", "train.epochs=2")
    (Path("empty")).mkdir()
    (Path("empty/recipe.yaml")).write_text(Path("short/recipe.yaml").read_text())
    build.extend("short", "longer", epochs=3, quiet=True)
    before = contents(".")

    def refused(run, out, *overrides, **length):
        with pytest.raises(UserError) as caught:
            build.extend(run, out, *overrides, quiet=True, **length)
        assert contents(".") == before and "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("short", "new", epochs=2) == "short has reached 2 epochs: give more, --epochs 4"
    assert "counted in epochs (2): give --epochs" in refused("short", "new", steps=40)
    assert "has no checkpoint yet" in refused("empty", "new", epochs=9)
    assert "is not a run folder" in refused("nothing", "new", epochs=9)
    assert "which stays as it is" in refused("short", "short", epochs=9)
    assert "which stays as it is" in refused("short", "short/more", epochs=9)
    assert "no extension of short" in refused("short", "empty", epochs=9)
    assert "longer was trained with train.epochs=3" in refused("short", "longer", epochs=9)
    assert "short was trained with seed=0, not 1: an extension changes" in refused("short", "new", "seed=1", epochs=9)
    record = Path("short/run.json").read_text()
    Path("short/run.json").write_text(record.replace('"count": 24', '"count": 20'))
    assert json.loads(Path("short/run.json").read_text())["data"]["count"] == 20
    before = contents(".")
    assert "have changed since short was trained on them (24 images, not 20)" in refused("short", "new", epochs=9)
    Path("short/run.json").write_text(record)
    before = contents(".")
    with pytest.raises(UserError, match="--epochs extends a run, whose folder is given in the place of RECIPE"):
        cli.training.train_arguments(["debug/tiny", "--out", "new", "--epochs", "9"])
    checkpoint = next(Path("short/checkpoints").glob("step_*6"))
    (checkpoint / "model.safetensors").write_bytes(b"other")
    before = contents(".")
    build.extend("short", "sound", epochs=3, quiet=True)  # from the checkpoint before the damaged one
    assert json.loads(Path("sound/run.json").read_text())["extends"]["step"] == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    build.extend(sys.argv[1], sys.argv[2], epochs=5, quiet=True)

"""A run interrupted at any moment and continued is the uninterrupted run, bit for bit on the CPU."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise.engine.journal import read_metrics
from maskwise.engine.trainer import Trainer

TIMING = {"img_s", "data_wait", "seconds"}
SMALL = ("data.count=40", "train.epochs=3", "train.save_every=4", "evaluate.pictures_every=0")


def recipe(*overrides):
    return maskwise.read_recipe("configs/debug/tiny.yaml", *SMALL, *overrides)


def state(folder):
    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()
    return last.name, {f"{part}/{key}": value for part in ("model", "optimizer") for key, value in load_file(last / f"{part}.safetensors").items()}


def assert_same(one, two):
    (step, expected), (other, found) = state(one), state(two)
    assert step == other and expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different, different
    assert lines(one) == lines(two)


def lines(folder):
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slowed down by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.manual_seed(1)
    assert maskwise.train(recipe(), out=folder, quiet=True)["status"] == "complete"
    return folder


@pytest.mark.parametrize("at", [1, 7])
def test_interrupted_in_the_middle_of_an_epoch(whole, tmp_path, monkeypatch, at):
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result = maskwise.train(recipe(), out=folder, quiet=True)
    assert (result["status"], result["step"]) == ("preempted", at + 1) and (folder / "preempted").exists()
    torch.manual_seed(99)  # what a fresh process has in its generators must not matter
    assert maskwise.train(recipe(), out=folder, quiet=True)["status"] == "complete"
    assert_same(whole, folder)
    assert maskwise.train(recipe(), out=folder, quiet=True)["status"] == "complete"


def test_data_workers_change_nothing(whole, tmp_path, monkeypatch):
    """Interrupted and continued with two data workers: speed settings change no result."""
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        maskwise.train(recipe("speed.workers=2"), out=tmp_path / "run", quiet=True)
    maskwise.train(recipe("speed.workers=2"), out=tmp_path / "run", quiet=True)
    assert_same(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_at_any_moment(whole, tmp_path):
    command = [sys.executable, "-m", "maskwise", "train", "configs/debug/tiny.yaml", "--out", str(tmp_path / "run"), *SMALL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for kill in range(4):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        saved = tmp_path / "run" / "checkpoints" / "last"
        while child.poll() is None and time.time() < deadline and not (saved.exists() and kill < 2):
            time.sleep(0.02)
            if kill >= 2 and saved.exists():
                time.sleep(0.3 * kill)
                break
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert_same(whole, tmp_path / "run")

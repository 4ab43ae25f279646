"""A run interrupted at any moment and continued is the uninterrupted run, bit for bit on the CPU."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import maskwise
from maskwise.engine.trainer import Trainer
from maskwise.methods.masking import MASKINGS
from support.hints import revealed
from support.run_contents import last_checkpoint, tensors, untimed_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("data.count=40", "train.epochs=3", "train.save_every=4", "evaluate.pictures_every=0", "masking.show_max=0.5")


def recipe(*overrides):
    return maskwise.read_recipe("configs/debug/tiny.yaml", *SMALL, *overrides)


def assert_same(expected_run, actual_run):
    expected, actual = tensors(expected_run), tensors(actual_run)
    assert last_checkpoint(expected_run).name == last_checkpoint(actual_run).name
    assert expected.keys() == actual.keys()
    different = [key for key in expected if not torch.equal(expected[key], actual[key])]
    assert not different, different
    assert untimed_lines(expected_run) == untimed_lines(actual_run)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.manual_seed(1)
    assert maskwise.train(recipe(), out=folder, quiet=True)["status"] == "complete"
    return folder


def test_hints_are_revealed():
    """In more than half of the 15 steps, on 4 x 4 patches."""
    masking = MASKINGS["attmask_hint"](seed=recipe().seed, **recipe().masking.keywords())
    assert sum(count > 0 for count in revealed(masking, range(15), 8)) > 7


@pytest.mark.parametrize("at", [1, 7])
def test_run_interrupted_within_an_epoch_equals_uninterrupted_run(reference_run, tmp_path, monkeypatch, at):
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
    assert_same(reference_run, folder)
    assert maskwise.train(recipe(), out=folder, quiet=True)["status"] == "complete"


def test_number_of_data_workers_changes_nothing(reference_run, tmp_path, monkeypatch):
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
    assert_same(reference_run, tmp_path / "run")


@pytest.mark.slow
def test_run_killed_at_any_moment_equals_uninterrupted_run(reference_run, tmp_path):
    command = [
        sys.executable,
        "-m",
        "maskwise",
        "train",
        "configs/debug/tiny.yaml",
        "--out",
        str(tmp_path / "run"),
        *SMALL,
    ]
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
    assert_same(reference_run, tmp_path / "run")

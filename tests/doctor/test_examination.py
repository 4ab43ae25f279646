"""The doctor's measurements against runs that really happen."""

import json
import os
import subprocess
import sys

import pytest
import torch

from maskwise import build
from maskwise.doctor import examine, machine
from maskwise.doctor.examination import Finding, growth
from maskwise.doctor.machine import GIB
from maskwise.doctor.report import measured, told
from maskwise.functional.errors import UserError
from maskwise.recipe import read_recipe


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


RECIPE = "from maskwise.recipe import read_recipe; recipe = read_recipe('debug/tiny', 'data.count=256', 'data.size=96', 'crops.global_size=64', 'backbone.depth=4', 'train.batch_size=32', 'evaluate.knn_every=0')"


@pytest.mark.slow
def test_memory_is_what_a_run_takes(tmp_path):
    """Within 20 % and 64 MiB of the peak of a process that trains; measured with 4 and with all 32 images."""
    train = f"{RECIPE}; from maskwise import build; build.train(recipe, {str(tmp_path / 'run')!r}, quiet=True); from maskwise.doctor.machine import Peak; import torch; "
    real = int(run(train + "print([int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"))
    for seconds in (0.001, 20):
        said = int(run(f"{RECIPE}; from maskwise.doctor import examine; print(examine(recipe, {seconds}).memory)"))
        assert abs(said - real) <= 0.2 * real + (64 << 20), (said / GIB, real / GIB)


@pytest.mark.slow
def test_the_rate_is_within_a_factor_of_what_a_run_shows(tmp_path):
    recipe = read_recipe("debug/tiny", "data.count=256", "data.size=96", "crops.global_size=64", "backbone.depth=4", "train.batch_size=32", "evaluate.knn_every=0", "train.epochs=4")
    ratios = []
    for attempt in range(3):  # a busy machine may trouble one of the two
        found = examine(recipe, 15.0)
        build.train(recipe, tmp_path / f"run{attempt}", quiet=True)
        lines = [json.loads(line) for line in (tmp_path / f"run{attempt}" / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(line["img_s"] for line in lines if "img_s" in line)
        ratios.append(found.rate / rates[len(rates) // 2])
        if 1 / 1.5 <= ratios[-1] <= 1.5:
            return
    raise AssertionError(ratios)


def test_a_short_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = examine(read_recipe("debug/tiny"), 0.001)
    assert found.batch == 8 and found.tried == 4 and set(found.steps) == {2, 4} and found.images == 64 and found.reason == ""
    assert found.rate == pytest.approx(8 / (found.step + found.loading)) and found.memory > 50 << 20
    assert not list(tmp_path.iterdir())  # nothing is written


def test_without_images_the_step_is_measured_and_the_reason_said(tmp_path):
    recipe = read_recipe("debug/tiny", "data.name=folder", f"data.path={tmp_path / 'gone'}", "evaluate.knn_every=0")
    found = examine(recipe, 0.001)
    assert found.loading is None and found.bound == "unknown" and "does not exist" in found.reason and found.images == 1_281_167
    text = told(recipe, 0.001)
    assert "not measured (data.path: " in text and "if loading keeps up" in text and "verdict" not in text


def test_the_report_names_everything():
    text = told(read_recipe("debug/tiny"), 0.001)
    for word in ("device", "precision", "decoders", "Pillow", "memory free", "step", "loading", "memory at peak", "fits", "img/s", "verdict", "-bound", "advice", "teacher.momentum"):
        assert word in text, word
    assert "give a recipe" in told(None, 1.0)


def test_lines_are_continued_from_the_two_largest():
    assert growth({2: (1.0,), 4: (3.0,), 8: (4.0,)}, 0) == 0.25 and growth({2: (1.0,)}, 0) == 0.0


def test_bounds_and_rates():
    beside = Finding(batch=32, tried=32, step=1.0, loading=2.0, memory=1, workers=2, images=100)
    assert beside.rate == 16 and beside.bound == "data-bound"
    before = Finding(batch=32, tried=16, step=1.0, loading=0.6, memory=GIB, workers=0, images=100)
    assert before.rate == 20 and before.bound == "compute-bound"
    facts = dict(measured(before, free=GIB // 2))
    assert "DOES NOT FIT into the 0.5 GiB" in facts["memory at peak"] and "continued from steps of 16" in facts["step"]


def test_the_machine():
    facts = dict(machine(torch.device("cpu"), "fp32"))
    assert "cores compute" in facts["device"] and facts["precision"].startswith("fp32") and "GiB" in facts["memory free"]


def test_ranks_are_refused(monkeypatch):
    from maskwise.doctor import report

    class Two:
        size, device = 2, torch.device("cpu")

        @staticmethod
        def close():
            pass

    monkeypatch.setattr(report.World, "start", lambda: Two)
    with pytest.raises(UserError, match="without torchrun"):
        told(None, 1.0)


def test_the_command(capsys):
    from maskwise.cli import main

    assert main(["doctor", "debug/tiny", "--seconds", "0"]) == 2
    assert "no time to measure" in capsys.readouterr().err
    assert main(["doctor", "debug/tinny"]) == 2
    assert "did you mean" in capsys.readouterr().err

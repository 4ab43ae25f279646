"""Measurements of `maskwise doctor` against real training runs."""

import json
import os
import subprocess
import sys

import pytest
import torch

from maskwise import build
from maskwise.doctor import Measurement, describe_machine, measure
from maskwise.doctor.machine import GIB
from maskwise.doctor.measure import growth
from maskwise.doctor.report import measurement_facts, report_text
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


SIZES = (
    "data.count=256",
    "data.size=96",
    "crops.global_size=64",
    "backbone.depth=4",
    "train.batch_size=32",
    "evaluate.knn_every=0",
)
RECIPE = f"from maskwise.recipe.reading import read_recipe; recipe = read_recipe('debug/tiny', *{SIZES})"


@pytest.mark.slow
def test_measured_memory_matches_a_run(tmp_path):
    """Within 20 % and 64 MiB of the peak of a process that trains; measured with 4 and with all 32 images."""
    train = (
        f"{RECIPE}; from maskwise import build; build.train(recipe, {str(tmp_path / 'run')!r}, quiet=True); "
        "from maskwise.doctor.machine import Peak; import torch; "
        "print([int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    real = int(run(train))
    for seconds in (0.001, 20):
        measured = int(run(f"{RECIPE}; from maskwise.doctor import measure; print(measure(recipe, {seconds}).memory)"))
        assert abs(measured - real) <= 0.2 * real + (64 << 20), (measured / GIB, real / GIB)


@pytest.mark.slow
def test_measured_rate_is_within_a_factor_of_a_run(tmp_path):
    recipe = read_recipe("debug/tiny", *SIZES, "train.epochs=4")
    ratios = []
    for attempt in range(3):  # a busy machine may slow down one of the two
        measurement = measure(recipe, 15.0)
        build.train(recipe, tmp_path / f"run{attempt}", quiet=True)
        lines = [json.loads(line) for line in (tmp_path / f"run{attempt}" / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(line["img_s"] for line in lines if "img_s" in line)
        ratios.append(measurement.rate / rates[len(rates) // 2])
        if 1 / 1.5 <= ratios[-1] <= 1.5:
            return
    raise AssertionError(ratios)


def test_a_short_measurement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measurement = measure(read_recipe("debug/tiny"), 0.001)
    assert measurement.batch == 8 and measurement.tried == 4 and set(measurement.steps) == {2, 4}
    assert measurement.images == 64 and measurement.reason == ""
    assert measurement.rate == pytest.approx(8 / (measurement.step + measurement.loading))
    assert measurement.memory > 50 << 20
    assert not list(tmp_path.iterdir())  # nothing is written


def test_without_images_only_the_step_is_measured(tmp_path):
    recipe = read_recipe("debug/tiny", "data.name=folder", f"data.path={tmp_path / 'gone'}", "evaluate.knn_every=0")
    measurement = measure(recipe, 0.001)
    assert measurement.loading is None and measurement.waiting == 0
    assert "does not exist" in measurement.reason and measurement.images == 1_281_167
    text = report_text(recipe, 0.001)
    assert "not measured (data.path: " in text and "if loading keeps up" in text and "verdict" not in text


def test_report_lists_all_measurements():
    text = report_text(read_recipe("debug/tiny"), 0.001)
    for word in (
        "device",
        "precision",
        "decoders",
        "Pillow",
        "memory free",
        "step",
        "loading",
        "memory at peak",
        "fits",
        "img/s",
        "verdict",
        "-bound",
        "advice",
        "teacher.momentum",
    ):
        assert word in text, word
    assert "give a recipe" in report_text(None, 1.0)


def test_no_heading_without_advice():
    text = report_text(read_recipe("debug/tiny_supervised"), 0.001)
    assert "verdict" in text and "advice" not in text


def test_growth_uses_the_two_largest_batches():
    assert growth({2: (1.0,), 4: (3.0,), 8: (4.0,)}, 0) == 0.25 and growth({2: (1.0,)}, 0) == 0.0


def test_bounds_and_rates():
    parallel = Measurement(batch=32, tried=32, step=1.0, loading=2.0, memory=1, workers=2, images=100)
    assert parallel.rate == 16 and parallel.waiting == 0.5
    facts = dict(measurement_facts(parallel, free=GIB, labels=False))
    assert facts["verdict"] == (
        "data-bound: use more speed.workers, smaller image files or tar shards; a faster device would not help"
    )
    serial = Measurement(batch=32, tried=16, step=1.0, loading=0.6, memory=GIB, workers=0, images=100)
    assert serial.rate == 20 and serial.waiting == pytest.approx(0.375)
    facts = dict(measurement_facts(serial, free=GIB // 2, labels=True))
    assert facts["verdict"].startswith("compute-bound: use smaller images (augment.size), ")
    assert facts["verdict"].endswith("faster loading would save at most 38 % of the time")
    assert facts["memory at peak"].endswith(
        "DOES NOT FIT into the 0.5 GiB of free memory: lower train.batch_size, or use smaller images (augment.size)"
    )
    assert "extrapolated from steps of 16" in facts["step"]


def test_the_machine_is_described():
    facts = dict(describe_machine(torch.device("cpu"), "fp32"))
    assert "threads on" in facts["device"] and facts["precision"] == "fp32 (this CPU has no fast bf16)"
    facts = dict(describe_machine(torch.device("cpu"), "bf16"))
    assert facts["precision"] == "bf16 (this CPU has fast bf16)"
    facts = dict(describe_machine(torch.device("cpu"), "fp32", requested="fp32"))
    assert facts["precision"] == "fp32 (set by train.precision)"
    assert "GiB" in facts["memory free"]


def test_several_ranks_are_an_error(monkeypatch):
    from maskwise.doctor import report

    class Two:
        size, device = 2, torch.device("cpu")

        @staticmethod
        def close():
            pass

    monkeypatch.setattr(report.World, "start", lambda: Two)
    with pytest.raises(UserError, match="without torchrun"):
        report_text(None, 1.0)


def test_the_command(capsys):
    from maskwise.cli.main import main

    assert main(["doctor", "debug/tiny", "--seconds", "0"]) == 2
    assert "--seconds is 0; give more than 0" in capsys.readouterr().err
    assert main(["doctor", "debug/tinny"]) == 2
    assert "did you mean" in capsys.readouterr().err

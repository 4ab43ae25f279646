"""The session on a GPU: parts as processes with limits, continuing, and every part in miniature."""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.reproduce.gpu import groups, parts, steps
from launch.reproduce.gpu.parts import PARTS, Part, Settings
from launch.reproduce.gpu.table import markdown

session = importlib.import_module("launch.reproduce.gpu.__main__")
TINY = Settings(device="cpu", miniature=True, seconds=60)
RECORD = {"command": None, "commit": None, "clean": None, "date": "2026-01-02", "seed": 0, "hardware": "a chip",
          "threads": 1, "torch": "2.14.1"}  # fmt: skip
WRITES = "import json, sys; json.dump({answer!r}, open(sys.argv[sys.argv.index('--out') + 1], 'w'))"


def writes(status="done", **result):
    return [sys.executable, "-c", WRITES.format(answer={"status": status, "record": RECORD, **result})]


@pytest.fixture
def commands(monkeypatch):
    """Replace the parts by three, and their processes by commands that a test sets; returns both tables."""
    table, calls = {}, []
    made = {name: Part(lambda settings: {}, limit=30, usual=5) for name in ("machine", "knn", "training")}
    for module in (session, importlib.import_module("launch.reproduce.gpu.table")):
        monkeypatch.setattr(module, "PARTS", made)

    def command_of(name, options, left):
        calls.append(name)
        return table[name]

    monkeypatch.setattr(session, "command_of", command_of)
    return table, calls


MACHINE = {"result": {"matmul_rate": {"fp32": 5e12}, "missing": ["timm"]}}
KNN = {"result": {"queries": 5, "bank": 10, "seconds": 2.0}}


def test_a_failed_part_is_measured_again_and_a_finished_one_is_not(commands, tmp_path, capsys):
    table, calls = commands
    table |= {"machine": writes(**MACHINE), "knn": [sys.executable, "-c", "raise SystemExit('no | memory')"]}
    table["training"] = writes("skipped", error="no images")
    assert session.main(["--out", str(tmp_path)]) == 1 and calls == ["machine", "knn", "training"]
    first = json.loads((tmp_path / "gpu.json").read_text())
    assert first["parts"]["knn"]["status"] == "failed" and "no | memory" in first["parts"]["knn"]["error"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| machine | done |" in page and "5 TFLOP/s; missing: timm |" in page
    assert "| knn | failed |" in page and "| no / memory |" in page and "| training | skipped |" in page

    table["knn"] = writes(**KNN)
    other = tmp_path / "other"
    assert session.main(["--out", str(other), "--from", str(tmp_path / "gpu.json")]) == 0
    assert calls[3:] == ["knn"]
    last = json.loads((other / "gpu.json").read_text())
    assert last["parts"]["machine"] == first["parts"]["machine"]
    assert "5 queries among 10 in 2 s" in capsys.readouterr().out


def test_a_part_is_ended_at_its_limit_with_its_children(commands, monkeypatch):
    table, _ = commands
    child = "import subprocess; subprocess.Popen(['sleep', '60']); input()"
    table |= {name: [sys.executable, "-c", child] for name in ("machine", "knn", "training")}
    read, write = os.pipe()  # `sleep` inherits it; the end of the pipe is seen when the last holder has ended
    os.set_inheritable(write, True)
    started = subprocess.Popen

    def popen(*arguments, **options):
        return started(*arguments, **options, pass_fds=(write,), stdin=subprocess.PIPE)

    monkeypatch.setattr(session.subprocess, "Popen", popen)
    limit = 3.0
    outcome = session.run_part("knn", table["knn"], limit)
    os.close(write)
    assert outcome["status"] == "timed out" and outcome["limit"] == limit
    assert os.read(read, 1) == b""  # returns only when no process holds the other end
    os.close(read)


def test_a_part_that_does_not_fit_is_left_to_the_next_call(commands, tmp_path, capsys):
    table, calls = commands
    table |= {"machine": writes(**MACHINE), "knn": writes(**KNN), "training": writes("skipped")}
    session.PARTS["knn"] = session.PARTS["knn"]._replace(usual=1000)
    assert session.main(["--out", str(tmp_path), "--minutes", "5"]) == 1
    assert calls == ["machine", "training"] and "knn" in capsys.readouterr().err
    assert "| knn | not yet measured |" in (tmp_path / "gpu.md").read_text()


def test_every_part_has_a_description_and_the_first_call_fits():
    from launch.reproduce.gpu.table import DESCRIPTIONS

    assert {name.partition(" ")[0] for name in PARTS} == set(DESCRIPTIONS)
    assert all(part.usual < part.limit for part in PARTS.values())
    assert sum(part.usual for part in PARTS.values()) < 15 * 60
    options = argparse.Namespace(device="cuda", seconds=180.0, miniature=False, images="a folder")
    assert session.command_of("training", options, 100.0)[-4:] == ["--seconds", "60.0", "--images", "a folder"]


def test_a_wrong_group_fails(monkeypatch):
    losses = {"plain": [4.0, 3.0], "ddp": [4.0, 3.1]}
    monkeypatch.setattr(groups, "run", lambda kind, settings: {"losses": losses[kind]})
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with pytest.raises(AssertionError, match="differ from those of a plain run by 3.3e-02"):
        groups.compare("ddp", TINY)


def test_the_run_log_is_summarized():
    lines = [{"step": 10, "loss": 5.0, "img_s": 7.0}, {"step": 20, "report": "knn", "numbers": {"top1": 12.0}}]
    found = parts.summary([*lines, {"step": 30, "loss": 4.0, "img_s": 8.0}])
    assert (
        found["steps"] == 30
        and found["losses"] == [(10, 5.0), (30, 4.0)]
        and found["knn"] == [(20, 12.0)]
        and found["images_per_second"] == [7, 8]
    )


def test_missing_packages_are_named_in_one_line(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/reproduce/gpu.sh", "--out", str(tmp_path / "out")],
        cwd=parts.ROOT,
        env={"PATH": os.environ["PATH"], "PYTHON": str(bare)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    [line] = done.stderr.splitlines()
    assert "lacks torch torchvision timm" in line and ".wheels" in line


@pytest.fixture
def default_kernels(monkeypatch):
    """Undo what deterministic kernels set in this process."""
    import torch

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


@pytest.mark.slow
def test_longer_parts_in_miniature(default_kernels):
    found = {"loading": parts.loading(TINY), "deterministic": groups.deterministic(TINY)}
    found["fsdp"] = groups.compare("fsdp", TINY)
    assert found["fsdp"]["relative_difference"] < 1e-5 and found["loading"]["end_to_end"]["parts"]["backward"] > 0


@pytest.mark.slow
def test_parts_in_miniature():
    found = {"machine": parts.machine(TINY), "packed": parts.packed(TINY), "knn": parts.knn(TINY)}
    found |= {f"step {name}": steps.measure(name, False, TINY) for name in ("vits16", "resnet50")}
    found["ddp"] = groups.compare("ddp", TINY)
    assert found["packed"]["outputs_differ"] < 1e-5 and found["packed"]["gradients_differ"] < 1e-4
    assert found["ddp"]["relative_difference"] < 1e-6 and found["step vits16"]["flops"] > 0
    page = markdown(
        {"record": RECORD, "parts": {k: {"status": "done", "seconds": 1, "result": v} for k, v in found.items()}}
    )
    assert page.count("| done |") == len(found) and "nan" not in page


@pytest.mark.long
def test_the_script_trains_in_a_process_of_its_own(tmp_path):
    root = Path(parts.ROOT)
    command = ["bash", "launch/reproduce/gpu.sh", "--miniature", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--minutes", "60", "--seconds", "3000"]  # of a machine that does other things
    done = subprocess.run(
        [*command, "--parts", "training"],
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert result["training"]["result"]["knn"] and math.isfinite(result["training"]["result"]["losses"][-1][1])

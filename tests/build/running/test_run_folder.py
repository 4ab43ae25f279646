"""Records of a run folder: version and commit of maskwise, the command."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import maskwise
from maskwise.build.running import run_folder
from maskwise.distributed.world import World

ROOT = Path(__file__).parents[3]


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_of_the_package(tmp_path, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("a copy without its repository")
    assert run_folder.commit().removesuffix("+") == git(ROOT, "rev-parse", "HEAD")[:12]
    git(tmp_path, "init", "-q")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "another project")
    installed = tmp_path / "env" / "maskwise" / "run_folder.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(installed))
    assert run_folder.commit() is None


def test_a_start_names_version_and_commit(monkeypatch):
    monkeypatch.setattr(run_folder, "commit", lambda: None)
    start = run_folder.start_record(World())
    assert start["versions"]["maskwise"] == maskwise.__version__ and start["commit"] is None


def test_the_command_can_be_repeated(tmp_path, monkeypatch):
    words = ["train", "configs/attmask/20pct_high.yaml", "data.path=my photos #2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["maskwise", *words])
    recipe = maskwise.read_recipe("debug/tiny")
    run_folder.write_run(tmp_path, recipe, World(), "fp32", {"count": 64})
    command = json.loads((tmp_path / "run.json").read_text())["command"]
    assert shlex.split(command) == ["maskwise", *words]
    assert run_folder.recipe_of(tmp_path) == "attmask/20pct_high"

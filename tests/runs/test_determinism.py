"""The same run gives the same bits: for any number of data workers, and with the deterministic option, on a GPU too."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise.engine.run_log import read_metrics
from maskwise.engine.runtime import use_deterministic_kernels
from support.run_contents import TIMING

pytestmark = pytest.mark.usefixtures("one_thread")


def outcome(folder, *overrides):
    """Every logged number and every tensor of the last checkpoint of a short run."""
    recipe = maskwise.read_recipe(
        "debug/tiny", "data.count=32", "train.epochs=2", "evaluate.pictures_every=0", *overrides
    )
    assert maskwise.train(recipe, out=folder, quiet=True)["status"] == "complete"
    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()
    lines = [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    return lines, {
        f"{part}/{key}": value
        for part in ("model", "optimizer")
        for key, value in load_file(last / f"{part}.safetensors").items()
    }


def assert_equal(expected, actual):
    assert expected[0] == actual[0]
    assert expected[1].keys() == actual[1].keys() and not [
        key for key in expected[1] if not torch.equal(expected[1][key], actual[1][key])
    ]


@pytest.fixture
def switches():
    """What the deterministic option sets for the whole process, put back."""
    workspace, cudnn = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = before[1:]
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_workers_and_deterministic_option_change_no_bit(tmp_path, switches):
    expected = outcome(tmp_path / "0", "speed.workers=0")
    assert len([line for line in expected[0] if "loss" in line]) == 4
    for workers in (1, 4):
        assert_equal(expected, outcome(tmp_path / str(workers), f"speed.workers={workers}"))
    assert_equal(expected, outcome(tmp_path / "deterministic", "speed.deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    start = json.loads((tmp_path / "deterministic" / "run.json").read_text())["starts"][0]
    assert start["deterministic"] is True and start["threads"] == 1
    assert json.loads((tmp_path / "0" / "run.json").read_text())["starts"][0]["deterministic"] is False


def test_deterministic_option_configures_cublas_before_it_starts(switches, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.backends.cudnn.deterministic
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own choice stays
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_on_a_gpu_are_equal(tmp_path, switches, precision):
    options = (
        "speed.deterministic=true",
        f"train.precision={precision}",
        "crops.local_number=4",
        "backbone.drop_path=0.1",
    )
    assert_equal(outcome(tmp_path / "one", *options), outcome(tmp_path / "two", *options))

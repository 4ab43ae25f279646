"""A run whose weights are split over two ranks, stopped and continued by one process, is a run like any other."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise import build
from maskwise.build import networks
from maskwise.engine.run_log import read_metrics
from maskwise.errors import UserError
from support import pair

# plain gradient descent: AdamW would enlarge the rounding of tiny gradients
OVERRIDES = ("train.log_every=1", "train.save_every=6", "optimizer=sgd", "optimizer.lr=0.8", "evaluate.k=[1]")


def recipe(*overrides):
    return maskwise.read_recipe("debug/tiny", *OVERRIDES, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("speed.compile=true",), "do not go together"),
        (
            ("optimizer=lamb",),
            "optimizer lamb does not support sharded tensors: choose adamw, sgd, lars, or speed.shard=none",
        ),
    ],
)
def test_unsupported_fsdp_recipes_are_errors(monkeypatch, overrides, message):
    from maskwise.distributed.world import World

    monkeypatch.setattr(networks, "can_compile", lambda device: True)
    with pytest.raises(UserError, match=message) as caught:
        build.trainer(maskwise.read_recipe("debug/tiny", "speed.shard=fsdp", *overrides), World(0, 2))
    assert "\n" not in str(caught.value)


def test_single_process_is_not_sharded():
    trainer = build.trainer(recipe("speed.shard=fsdp"))
    assert trainer.shards is None and trainer.eval_model() is trainer.method


@pytest.mark.slow
def test_convolutional_networks_are_sharded(tmp_path):
    """Their weights are in channels-last memory, which FSDP2 does not take."""
    network = ("backbone=convnext_atto", "backbone.depths=[1, 1, 1, 1]", "backbone.dims=[8, 8, 8, 16]")
    words = (*OVERRIDES, *network, "pooling=simpool", "method=dino", "masking=none", "train.epochs=1")
    words = (*words, "crops.global_size=64", "crops.local_size=32", "evaluate.knn_every=0", "speed.shard=fsdp")
    maskwise.train(maskwise.read_recipe("debug/tiny", *words), out=tmp_path / "one", quiet=True)
    pair.end(pair.start("-m", "maskwise", "train", "debug/tiny", "--out", tmp_path / "two", *words))
    one, two = (
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in row]
        for out in ("one", "two")
    )
    assert len(one) == 8 and one == pytest.approx(two, rel=1e-5, abs=1e-5)  # losses of the last steps are near .1


@pytest.mark.slow
def test_fsdp_run_stopped_and_resumed_by_one_process(tmp_path):
    reference, sharded = tmp_path / "whole", tmp_path / "split"
    maskwise.train(recipe(), out=reference, quiet=True)
    pair.end(pair.start(__file__, sharded, MASKWISE_TIMEOUT="120"))
    assert (sharded / "checkpoints" / "last").read_text() == "step_00000010\n" and (sharded / "preempted").exists()
    assert not list((sharded / "checkpoints").glob(".*")), "nothing half-written is left"
    assert (sharded / "pictures").is_dir() and (sharded / "reports" / "knn_step_00000008.json").is_file()
    assert isinstance(maskwise.load(sharded), maskwise.Encoder)

    assert maskwise.train(recipe(), out=sharded, quiet=True)["status"] == "complete"
    for part in ("model", "optimizer"):
        expected, actual = (
            load_file(folder / "checkpoints" / "step_00000016" / f"{part}.safetensors")
            for folder in (reference, sharded)
        )
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            off = (value - actual[name]).abs().max() / value.abs().max().clamp(min=1e-6)
            assert off <= 2e-5, f"{name} off by {off:.2g}"
    expected_lines, actual_lines = (
        [expected_line for expected_line in read_metrics(folder / "metrics.jsonl") if "loss" in expected_line]
        for folder in (reference, sharded)
    )
    assert (
        [expected_line["step"] for expected_line in expected_lines]
        == [expected_line["step"] for expected_line in actual_lines]
        == list(range(1, 17))
    )
    for expected_line, actual_line in zip(expected_lines, actual_lines):
        allowed = 2e-6 if expected_line["step"] <= 10 else 1e-5  # rounding errors grow with the steps
        assert abs(expected_line["loss"] - actual_line["loss"]) <= allowed * expected_line["loss"], expected_line[
            "step"
        ]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected_features, actual_features = (
        maskwise.load(folder).eval()(images).pooled for folder in (reference, sharded)
    )
    torch.testing.assert_close(expected_features, actual_features, rtol=1e-4, atol=1e-5)


def run_rank(folder):
    """Run a rank that receives a stop signal at its tenth step."""
    from maskwise.engine.trainer import Trainer

    step = Trainer.step

    def step_with_signal(trainer, *arguments, **options):
        if trainer.step_index == 9 and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.shards is not None
        return step(trainer, *arguments, **options)

    Trainer.step = step_with_signal
    result = maskwise.train(recipe("speed.shard=fsdp"), out=folder, quiet=True)
    assert (result["status"], result["step"]) == ("preempted", 10), result


if __name__ == "__main__":
    run_rank(sys.argv[1])

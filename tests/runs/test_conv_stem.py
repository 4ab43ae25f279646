"""Runs of a ViT with a convolutional stem: every masking takes steps, resume is exact, buffers reach the teacher."""

import os
import signal

import pytest
import torch

import maskwise
from maskwise.build import networks
from maskwise.engine.trainer import Trainer
from maskwise.methods.masking import MASKINGS
from support.run_contents import tensors, untimed_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "data.count=24",
    "train.epochs=2",
    "train.log_every=1",
    "evaluate.knn_every=0",
    "evaluate.pictures_every=0",
    "backbone.patch_size=null",
    "backbone.stem=conv",
    "backbone.stem_channels=[6, 8, 12]",
    "backbone.stem_strides=[2, 2, 2]",
)


def recipe(*overrides):
    return maskwise.read_recipe("configs/debug/tiny.yaml", *SMALL, *overrides)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("pooling", ["cls", "simpool"])
def test_every_masking_trains_every_part_of_the_stem(masking, pooling, tmp_path):
    method = "dino" if masking == "none" else "ibot"
    run = recipe(f"masking={masking}", f"pooling={pooling}", f"method={method}", "train.epochs=1", "data.count=16")
    first = networks.encoder(run).state_dict()
    result = maskwise.train(run, out=tmp_path / "run", quiet=True)
    assert (result["status"], result["step"], result["skipped"]) == ("complete", 2, 0)
    trained = maskwise.load(tmp_path / "run", weights="student").state_dict()
    stem = [key for key in trained if "patch_embed" in key]
    assert len(stem) == 3 * 3 + 2  # three convolutions with a norm, and the projection
    assert all(not torch.equal(trained[key], first[key]) for key in stem)
    assert maskwise.load(tmp_path / "run").backbone.patch_size == (8, 8)


def interrupt_at(patch, at):
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    patch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_an_interrupted_run_equals_an_uninterrupted_one(norm, tmp_path, monkeypatch):
    run = recipe(f"backbone.stem_norm_layer={norm}", "pooling=simpool", "evaluate.knn_every=2")
    maskwise.train(run, out=tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert maskwise.train(run, out=tmp_path / "parts", quiet=True)["status"] == "preempted"
    torch.manual_seed(99)
    maskwise.train(run, out=tmp_path / "parts", quiet=True)
    expected, actual = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[key]) for key, value in expected.items())
    assert untimed_lines(tmp_path / "whole") == untimed_lines(tmp_path / "parts")
    means = [value for key, value in expected.items() if key.endswith("bn.running_mean") and "teacher" in key]
    assert len(means) == (3 if norm == "batch" else 0) and all(mean.abs().sum() > 0 for mean in means)

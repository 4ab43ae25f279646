"""Whitening in runs: learned once from training images, the same for student, teacher, ranks and after a restart."""

import os
import signal

import numpy as np
import pytest
import torch

import maskwise
from maskwise.build import whitening
from maskwise.build.inputs import dataset
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.functional import keyed_random
from support import pair
from support.run_contents import tensors, untimed_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("data.count=24", "train.epochs=2", "evaluate.knn_every=0", "evaluate.pictures_every=0", "backbone.whiten=3")
NETWORKS = {
    "vit": (
        "backbone.patch_size=null",
        "backbone.stem=conv",
        "backbone.stem_channels=[6, 8, 12]",
        "backbone.stem_strides=[2, 2, 2]",
    ),
    "resnet": (
        "backbone=resnet18",
        "backbone.small_stem=true",
        "backbone.layers=[1, 1, 1, 1]",
        "backbone.channels=[8, 8, 8, 16]",
        "pooling=simpool",
        "method=dino",
        "masking=none",
    ),
}


def recipe(kind, *overrides):
    return maskwise.read_recipe("configs/debug/tiny.yaml", *SMALL, *NETWORKS[kind], *overrides)


def filters(run):
    return {key: value for key, value in tensors(run).items() if "whiten" in key}


def expected_filters(run):
    """NumPy's whitening of the 3 x 3 patches of the run's images, in the order of its first epoch."""
    data, encoder = dataset(run), whitening_encoder(run)
    order = keyed_random.order(run.seed, 0, len(data)).tolist()
    pixels = torch.stack([encoder.transform(data.image(index)) for index in order]).numpy().astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))  # [B, C, h, w, 3, 3]
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    return vectors[:, ::-1].T / np.sqrt(values[::-1, None] + 5e-4)


def whitening_encoder(run):
    from maskwise.build.networks import encoder

    return encoder(run)


@pytest.mark.parametrize("kind", NETWORKS)
def test_filters_are_learned_once_and_kept(kind, tmp_path, monkeypatch):
    """Interrupted and continued: nothing is learned again, and the run equals an uninterrupted one."""
    run, calls, step = recipe(kind), [], Trainer.step
    learn = whitening.whitening_filters
    monkeypatch.setattr(whitening, "whitening_filters", lambda covariance: calls.append(1) or learn(covariance))
    maskwise.train(run, out=tmp_path / "whole", quiet=True)
    assert len(calls) == 1

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        maskwise.train(run, out=tmp_path / "parts", quiet=True)
    assert len(calls) == 2
    maskwise.train(run, out=tmp_path / "parts", quiet=True)
    assert len(calls) == 2
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert untimed_lines(tmp_path / "whole") == untimed_lines(tmp_path / "parts")

    kept = filters(tmp_path / "whole")
    assert {key.split(".")[0] for key in kept} == {"model/student", "model/teacher"} and len(kept) == 2
    expected = expected_filters(run)
    for value in kept.values():
        assert value.shape == (27, 3, 3, 3)
        own = value.flatten(1).double().numpy()
        signs = np.sign((own * expected).sum(1, keepdims=True))
        np.testing.assert_allclose(own, signs * expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    loaded = maskwise.load(tmp_path / "whole")
    (layer,) = (part for part in loaded.modules() if isinstance(part, whitening.Whitening))
    assert torch.equal(layer.weight, next(iter(kept.values())))


def test_a_run_that_continues_a_model_keeps_its_filters(tmp_path):
    maskwise.train(recipe("vit"), out=tmp_path / "first", quiet=True)
    run = recipe("vit", f"method.start_from={tmp_path / 'first'}", "seed=5", "train.epochs=1")
    maskwise.train(run, out=tmp_path / "second", quiet=True)
    first, second = filters(tmp_path / "first"), filters(tmp_path / "second")
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_start_says_so(tmp_path, capfd):
    maskwise.train(recipe("vit", "train.steps=1", "optimizer.warmup_epochs=0.1"), out=tmp_path / "run")
    assert "whitening of 3 x 3 patches learned from 24 images" in "".join(capfd.readouterr())


def test_supervised_runs_learn_filters_too(tmp_path):
    run = maskwise.read_recipe(
        "configs/debug/tiny_supervised.yaml",
        "data.count=16",
        "train.epochs=1",
        "backbone.patch_size=null",
        "backbone.whiten=2",
        "backbone.whiten_signs=true",
        *NETWORKS["vit"],
    )
    maskwise.train(run, out=tmp_path / "run", quiet=True)
    for value in filters(tmp_path / "run").values():
        assert value.shape == (24, 3, 2, 2) and torch.equal(value[:12], -value[12:])
        gram = value[:12].flatten(1) @ value[:12].flatten(1).T
        assert gram.sub(torch.diag(gram.diagonal())).abs().max() < 1e-3 * gram.max()  # eigenvectors


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_ranks_learn_the_filters_of_one_process(shard, tmp_path):
    """Also with sharded weights, whose buffers every rank holds."""
    words = ("train.log_every=1", "train.epochs=1", "optimizer=sgd", "optimizer.lr=0.8", f"speed.shard={shard}")
    run = recipe("vit", *words)
    maskwise.train(run, out=tmp_path / "one", quiet=True)
    overrides = (*SMALL, *NETWORKS["vit"], *words)
    pair.end(pair.start("-m", "maskwise", "train", "configs/debug/tiny.yaml", "--out", tmp_path / "two", *overrides))
    one, two = filters(tmp_path / "one"), filters(tmp_path / "two")
    assert len(one) == 2 and one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in row]
        for out in ("one", "two")
    ]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)

"""Accuracy by the share of the test image: against crops made by hand, and against whole training images."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import maskwise
from launch.reproduce import crop_shares
from maskwise import build
from maskwise.recipe.reading import read_recipe

COUNT = 512
WHOLE = (
    "augment.scale=[1,1]",
    "augment.ratio=[1,1]",
    "augment.flip=0",
    "augment.policy=null",
    "augment.erasing=0",
    "augment.jitter=0",
)
LONG_ENOUGH = ("train.epochs=12", "train.batch_size=32", "optimizer.lr=3e-3", "evaluate.top1_every=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = (f"data.count={COUNT}", "data.size=32", "augment.mixup=0", "augment.cutmix=0", *WHOLE, *LONG_ENOUGH)
    maskwise.train(read_recipe("debug/tiny_supervised", *words), out=folder / "row" / "seed0", quiet=True)
    return folder


def teacher(folder):
    """Return the encoder and the classifier's weight and bias of the last checkpoint."""
    weights = load_file(sorted(folder.glob("checkpoints/step_*/model.safetensors"))[-1])
    return maskwise.load(folder), weights["teacher.head.linear.weight"], weights["teacher.head.linear.bias"]


@pytest.mark.parametrize("share", ["1", "0.7"])
def test_a_share_is_a_central_crop_of_the_resized_image(runs, share):
    folder = runs / "row" / "seed0"
    encoder, weight, bias = teacher(folder)
    data = build.dataset(read_recipe(folder), "test")
    [side] = set(encoder.image_size)
    resized = round(side / float(share))
    first = (resized - side) // 2
    images = torch.stack([data.image(i) for i in range(len(data))])
    images = F.interpolate(images.float(), size=(resized, resized), mode="bicubic", antialias=True)
    images = images.round().clamp(0, 255)[:, :, first : first + side, first : first + side] / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        logits = encoder((images - mean) / std).pooled @ weight.T + bias
    expected = 100 * float((logits.argmax(1) == data.labels).float().mean())
    assert crop_shares.on_test_crops(folder)[share] == pytest.approx(expected, abs=100 / len(data) + 1e-6)


def test_training_crops_of_whole_images_are_the_training_images(runs):
    folder = runs / "row" / "seed0"
    whole = maskwise.evaluate("top1", folder, test=build.dataset(read_recipe(folder)), crop_pct=1.0)
    assert crop_shares.on_training_crops(folder) == pytest.approx(whole.numbers["top1"], abs=100 / COUNT + 1e-6)


def test_the_table_has_a_row_for_each_run_and_their_means(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crop_shares, "on_test_crops", lambda folder: {f"{share:g}": 50.0 for share in (1.0, 0.5)})
    monkeypatch.setattr(crop_shares, "on_training_crops", lambda folder: 60.0)
    assert crop_shares.main([str(runs), "--json", str(tmp_path / "shares.json")]) == 0
    stored = json.loads((tmp_path / "shares.json").read_text())
    [run] = stored["runs"].values()
    assert list(stored["runs"]) == ["row/seed0"] and stored["record"]["seed"] == [0]
    assert run["test_crops"] == {"1": 50.0, "0.5": 50.0} and run["training_crops"] == 60.0
    assert run["training_scale"] == [1.0, 1.0] and run["crop_pct"] == 0.875
    assert run["trained"]["command"].startswith("maskwise")
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mean", "50.00", "50.00", "60.00"]


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert crop_shares.main([str(tmp_path)]) == 2
    assert "holds no supervised run with a checkpoint" in capsys.readouterr().err

"""Accuracy by the share of the test image: against crops made by hand, and against whole training images."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import maskwise
from launch.reproduce import crop_shares
from maskwise import build
from maskwise.evaluation.baselines import baselines
from maskwise.recipe.reading import read_recipe

COUNT = 512
WHOLE = (
    "augment.scale=[1,1]",
    "augment.ratio=[1,1]",
    "augment.flip=0",
    "augment.policy=null",
    "augment.erasing=0",
    "augment.jitter=0",
    "augment.mixup=0",
    "augment.cutmix=0",
)
LONG_ENOUGH = ("train.epochs=12", "train.batch_size=32", "optimizer.lr=3e-3", "evaluate.top1_every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    words = (f"data.count={COUNT}", "data.size=32", *WHOLE, *LONG_ENOUGH)
    maskwise.train(read_recipe("debug/tiny_supervised", *words), out=runs / "labels" / "seed0", quiet=True)
    maskwise.train(read_recipe("debug/tiny", "evaluate.knn_every=0"), out=runs / "none" / "seed0", quiet=True)
    return runs


def central(images, share, side):
    """Return normalized images [B, 3, side, side], resized so that the central crop keeps this share of their side."""
    resized = round(side / share)
    first = (resized - side) // 2
    images = F.interpolate(images.float(), size=(resized, resized), mode="bicubic", antialias=True)
    return images.round().clamp(0, 255)[:, :, first : first + side, first : first + side] / 255


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_a_share_is_a_central_crop_of_the_resized_image(folder, share):
    run = folder / "labels" / "seed0"
    weights = load_file(sorted(run.glob("checkpoints/step_*/model.safetensors"))[-1])
    encoder, data = maskwise.load(run), build.dataset(read_recipe(run), "test")
    [side] = set(encoder.image_size)
    images = central(torch.stack([data.image(i) for i in range(len(data))]), share, side)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        features = encoder((images - mean) / std).pooled
    logits = features @ weights["teacher.head.linear.weight"].T + weights["teacher.head.linear.bias"]
    expected = 100 * float((logits.argmax(1) == data.labels).float().mean())
    assert crop_shares.top1(run, share) == pytest.approx(expected, abs=100 / len(data) + 1e-6)


def test_training_crops_of_whole_images_are_the_training_images(folder):
    run = folder / "labels" / "seed0"
    whole = maskwise.evaluate("top1", run, test=build.dataset(read_recipe(run)), crop_pct=1.0)
    assert crop_shares.training_crops(run) == pytest.approx(whole.numbers["top1"], abs=100 / COUNT + 1e-6)


def test_central_crops_are_the_middle_of_an_image():
    class Gradient:
        labels, classes = torch.zeros(1, dtype=torch.int64), None

        def image(self, index):
            return torch.arange(6 * 10, dtype=torch.uint8).view(1, 6, 10)

    crop = crop_shares.CentralCrops(Gradient(), 2 / 3).image(0)
    assert crop[0].tolist() == [list(range(row + 3, row + 7)) for row in (10, 20, 30, 40)]


def test_pixels_of_whole_images_are_the_baseline_of_the_run(folder):
    run = folder / "none" / "seed0"
    recipe = read_recipe(run)
    sets = {role: build.dataset(recipe, role) for role in ("train", "test")}
    expected = baselines(sets, untrained=build.encoder(recipe), k=crop_shares.K).numbers
    [key] = [key for key in expected if key.startswith("pixels_top1")]
    assert crop_shares.pixels(run, 1.0) == expected[key]


def test_every_run_has_its_row(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crop_shares, "SHARES", (1.0, 0.5))
    assert crop_shares.main([str(folder), "--json", str(tmp_path / "shares.json")]) == 0
    stored = json.loads((tmp_path / "shares.json").read_text())
    labels, none = (stored["runs"][f"{name}/seed0"] for name in ("labels", "none"))
    assert stored["record"]["seed"] == [0] and labels["trained"]["command"].startswith("maskwise")
    assert labels["metric"] == "top1" and labels["training_scale"] == [1.0, 1.0] and labels["crop_pct"] == 0.875
    assert none["metric"] == "knn" and none["training_scale"] == [0.25, 1.0]
    run = folder / "none" / "seed0"
    at_half = maskwise.evaluate("knn", run, k=20, crop_pct=0.5).numbers["pooled_top1_k20"]
    assert none["test_crops"]["0.5"] == at_half and set(none["pixels"]) == {"1", "0.5"}
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["labels/seed0", "top1"], ["none/seed0", "knn"]]
    assert rows[0].split()[-1] == f"{labels['training_crops']:.2f}"


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert crop_shares.main([str(tmp_path)]) == 2
    assert "holds no run with a checkpoint" in capsys.readouterr().err

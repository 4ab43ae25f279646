"""`maskwise baselines`, and pixels as models of `maskwise evaluate`."""

import json

import pytest
from PIL import Image

from evaluation.test_baselines import COUNT, picture
from maskwise import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The planted images as files: raw pixels are always wrong at k = 1, whitened ones always right."""
    root = tmp_path_factory.mktemp("planted")
    for split in ("train", "val"):
        for place in range(COUNT):
            label = (place + (split == "val")) % 2
            (root / split / "ab"[label]).mkdir(parents=True, exist_ok=True)
            pixels = picture(place, label).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(root / split / "ab"[label] / f"{place}.png")
    return root


def test_a_folder_with_a_test_split(folder, capsys):
    assert cli.main(["baselines", str(folder), "k=1", "size=8"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "k-NN top-1, per cent (k = 1, bank of 32 images, 32 queries; pixels at 8 x 8; chance 50.0)",
        "  raw pixels                        0.0",
        "  whitened pixels                 100.0   3 dimensions",
    ]


def test_a_folder_alone_holds_out_a_tenth(folder, capsys):
    assert cli.main(["baselines", str(folder / "train"), "k=1", "size=8", "--json", "-"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert (result["protocol"]["bank"], result["protocol"]["queries"]) == (30, 2)
    assert "train: 2 of 32 images are held out for evaluations (data.holdout=0.1)" in result["notes"]


def test_an_untrained_network_of_a_folder_is_a_function_of_the_seed(folder, tmp_path, capsys):
    words = ["baselines", str(folder / "train"), f"test={folder / 'val'}", "backbone=resnet10t", "k=[1,20]", "size=8"]
    numbers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli.main([*words, f"seed={seed}", "--json", str(tmp_path / f"{name}.json")]) == 0
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["record"]["seed"] == seed and next(iter(result)) == "record"
        numbers.append(result["numbers"])
    assert numbers[0] == numbers[1] and numbers[0]["whitened_pixels_top1_k1"] == 100.0
    assert {"untrained_pooled_top1_k20", "untrained_patch_mean_top1_k1"} <= set(numbers[0])
    assert "  untrained network" in capsys.readouterr().out


def test_a_recipe_with_overrides(capsys):
    assert cli.main(["baselines", "debug/tiny", "data.count=40", "k=5", "limit_test=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("k-NN top-1, per cent (k = 5, bank of 40 images, 16 queries; pixels at 32 x 32")
    assert [line.split("  ")[1] for line in lines[1:]] == ["untrained network", "raw pixels", "whitened pixels"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["{folder}", "train.epochs=2"], "baselines: train.epochs=2 goes with a recipe, and {folder} holds images"),
        (["debug/tiny", "backbone=resnet18"], "baselines: backbone goes with a folder of images; a recipe has its own"),
        (["{folder}", "kk=1"], "baselines has no option kk; did you mean `k`?"),
        (["{folder}", "limit_train=0"], "baselines: limit_train is 0; it must be at least 1"),
        (["nowhere"], "no recipe nowhere"),
        (["{folder}", "--json", "{folder}/none/x.json"], "--json {folder}/none/x.json: its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, text):
    assert cli.main(["baselines", *(word.format(folder=folder) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"maskwise: {text.format(folder=folder)}") and captured.err.count("\n") == 1


def test_pixels_are_models(folder, capsys):
    words = [f"train={folder / 'train'}", f"test={folder / 'val'}", "k=1", "image_size=8"]
    for name, accuracy in (("pixels", "0.00"), ("whitened_pixels", "100.00")):
        assert cli.main(["evaluate", "knn", name, *words]) == 0
        assert f"top1                     {accuracy}" in capsys.readouterr().out
    assert cli.main(["evaluate", "clustering", "whitened_pixels", words[1]]) == 2
    assert "whitened_pixels are fitted to training images; give train=FOLDER" in capsys.readouterr().err
    assert cli.main(["evaluate", "knn", "pixels", *words, "gamma=2"]) == 2
    assert "pixels takes image_size, a number of pixels, and none of the other" in capsys.readouterr().err

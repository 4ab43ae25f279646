"""`maskwise train --data FOLDER`: what is picked, that it can be read, and that it trains."""

import pytest
import torch
from PIL import Image

from maskwise import starter
from maskwise.cli import main
from maskwise.functional.errors import UserError
from maskwise.recipe import read_recipe
from maskwise.starter import Images

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def folder(root, *, classes=("a", "b"), count=6, size=(40, 30), splits=("train", "val")):
    for split in splits or ("",):
        for k, label in enumerate(classes or ("",)):
            place = root / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", size, (40 * k, i, 9)).save(place / f"{i}.png")
    return root


def found(tmp_path, text):
    (tmp_path / "picked.yaml").write_text(text)
    return read_recipe(tmp_path / "picked.yaml")


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("count", [2, 1_000, 1_281_167])
def test_every_choice_is_a_recipe_that_can_run(tmp_path, monkeypatch, device, side, count):
    monkeypatch.setattr(starter, "look_at", lambda path: Images(count, side, {"name": "folder", "path": "images"}, False))
    picked = starter.start("images", device)
    recipe = found(tmp_path, picked.text)
    batch = recipe.train.batch_size
    assert 1 < batch <= count and (count < 64 or count // batch >= 7)
    assert recipe.crops.global_size <= max(side, 112 if device == CPU else 224) and recipe.crops.local_size < recipe.crops.global_size
    assert recipe.optimizer.warmup_epochs <= recipe.train.epochs and recipe.evaluate.knn_every == 0
    assert "\n" not in "".join(picked.said) and any(str(count) in line for line in picked.said)


def test_the_published_settings_for_a_gpu_and_a_large_set(tmp_path, monkeypatch):
    monkeypatch.setattr(starter, "look_at", lambda path: Images(1_281_167, 400, {"name": "folder", "path": "images"}, True))
    recipe = found(tmp_path, starter.start("images", GPU).text)
    published = read_recipe("pretrain/attmask_hint_vits16")
    for key in ("crops.global_size", "crops.local_size", "crops.local_number", "backbone.name", "head.prototypes", "head.norm_last_layer", "masking.name", "masking.ratio",
                "teacher.momentum", "teacher.temp", "teacher.warmup_temp_epochs", "optimizer.lr", "train.batch_size", "train.epochs"):  # fmt: skip
        assert recipe.values[key] == published.values[key], key
    assert recipe.crops.global_scale == published.crops.global_scale


def test_splits_and_labels_are_found(tmp_path):
    images = starter.look_at(folder(tmp_path / "both"))
    assert images.count == 12 and images.side == 30 and images.labelled and images.keys["split"] == "train" and images.keys["test_split"] == "val"
    plain = starter.look_at(folder(tmp_path / "plain", splits=()))
    assert plain.count == 12 and plain.labelled and "split" not in plain.keys
    bare = starter.look_at(folder(tmp_path / "bare", classes=(), splits=("train", "test")))
    assert bare.count == 6 and not bare.labelled and "test_split" not in bare.keys
    classes = starter.look_at(folder(tmp_path / "odd", classes=(), splits=("train", "tram")))
    assert classes.count == 12 and classes.labelled  # a class called train
    (tmp_path / "list.txt").write_text("\n".join(f"plain/a/{i}.png" for i in range(6)))
    listed = starter.look_at(tmp_path / "list.txt")
    assert listed.count == 6 and listed.keys["name"] == "list"


def test_what_cannot_be_started_ends_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "one", classes=(), splits=(), count=1)
    (tmp_path / "bad").mkdir()
    for k in range(3):
        (tmp_path / "bad" / f"{k}.jpg").write_text("no picture")
    for name, words in (("gone", "does not exist"), ("empty", "is empty"), ("one", "holds 1 image"), ("bad", "none of 3 images tried can be read")):
        with pytest.raises(UserError, match=words) as caught:
            starter.start(tmp_path / name, CPU)
        assert "\n" not in str(caught.value)


def test_the_command_picks_writes_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mine", count=20)
    short = ["backbone.depth=1", "backbone.embed_dim=24", "backbone.num_heads=2", "head.hidden=16", "head.prototypes=16", "train.steps=2", "evaluate.knn_every=0"]
    short += ["optimizer.warmup_epochs=0", "evaluate.pictures_every=0"]
    assert main(["train", "--data", "mine", *short]) == 0
    said = capsys.readouterr().out
    assert "40 labelled images of about 30 px" in said and "momentum" in said and "recipe: runs/mine.yaml" in said and "complete: 2 steps in runs/mine" in said
    assert read_recipe("runs/mine.yaml").data.keywords()["path"] == str(tmp_path / "mine")
    assert main(["train", "--data", "mine", *short]) == 0
    assert "from an earlier start" in capsys.readouterr().out
    assert main(["train", "debug/tiny", "--data", "mine", "--out", "other", "data.split=train", "train.steps=1", "train.epochs=1", "evaluate.knn_every=0",
                 "optimizer.warmup_epochs=0", "teacher.warmup_temp_epochs=0"]) == 0  # fmt: skip
    assert read_recipe("other").data.keywords()["path"] == "mine"


def test_the_command_without_enough(capsys):
    assert main(["train"]) == 2 and "give a RECIPE, or --data FOLDER" in capsys.readouterr().err
    assert main(["train", "debug/tiny"]) == 2 and "give --out DIR" in capsys.readouterr().err
    assert main(["train", "--data", "nowhere", "--out", "x"]) == 2 and "nowhere does not exist" in capsys.readouterr().err

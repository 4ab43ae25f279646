"""`maskwise train --data FOLDER`: the suggested recipe can be read and trains."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskwise import build
from maskwise.cli.main import main
from maskwise.doctor import Measurement, suggest_recipe
from maskwise.doctor.regimes import REGIMES, regime_of
from maskwise.doctor.suggest_recipe import Images
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

RESULTS = Path(__file__).parents[2] / "docs" / "results"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def folder(root, *, classes=("a", "b"), count=6, size=(40, 30), splits=("train", "val")):
    for split in splits or ("",):
        for k, label in enumerate(classes or ("",)):
            place = root / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", size, (40 * k, i, 9)).save(place / f"{i}.png")
    return root


def parsed(tmp_path, text):
    (tmp_path / "suggested.yaml").write_text(text)
    return read_recipe(tmp_path / "suggested.yaml")


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("count", [2, 1_000, 1_281_167])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_every_suggested_recipe_is_valid(tmp_path, monkeypatch, device, side, count, masked):
    monkeypatch.setattr(
        suggest_recipe, "look_at", lambda path: Images(count, side, {"name": "folder", "path": "images"}, False)
    )
    suggestion = suggest_recipe.suggest("images", device, masked=masked)
    recipe = parsed(tmp_path, suggestion.text)
    batch = recipe.train.batch_size
    assert 1 < batch <= count and (count < 64 or count // batch >= 7)
    assert (
        recipe.crops.global_size <= max(side, 112 if device == CPU else 224)
        and recipe.crops.local_size < recipe.crops.global_size
    )
    assert recipe.optimizer.warmup_epochs <= recipe.train.epochs and recipe.evaluate.knn_every == 0
    assert "\n" not in "".join(suggestion.reasons) and any(str(count) in line for line in suggestion.reasons)
    assert (recipe.masking.name != "none") == (masked or (device == GPU and count > 100_000))


@pytest.mark.parametrize(
    "device, side, count, masked, name",
    [
        ("cpu", 32, 10_000, False, "resnet cpu below 64"),
        ("cpu", 64, 10_000, False, "resnet cpu below 96"),
        ("cpu", 96, 1_281_167, False, "resnet cpu from 96"),
        ("cuda", 63, 99_999, False, "resnet gpu below 64"),
        ("cuda", 63, 100_000, False, "vit gpu below 64"),
        ("cuda", 224, 3_200, False, "resnet gpu from 96"),
        ("cuda", 224, 3_200, True, "vit gpu from 64"),
        ("cpu", 32, 10_000, True, "vit cpu below 64"),
        ("cpu", 112, 10, True, "vit cpu from 96"),
    ],
)
def test_regimes(device, side, count, masked, name):
    assert regime_of(device, side, count, masked=masked) == name and name in REGIMES


def test_measured_figures_are_those_of_the_committed_runs():
    known = [regime.measured for regime in REGIMES.values() if regime.measured is not None]
    assert known
    for measured in known:
        run = json.loads((RESULTS / measured.result).read_text())
        figures = run["knn_top1_k20"]
        assert measured.images == run["images"]["train"]
        assert measured.epochs == run["steps"] // (measured.images // run["batch_size"])
        assert measured.knn == pytest.approx(figures["teacher"]["pooled"], abs=0.051)
        assert measured.untrained == pytest.approx(figures["untrained"]["pooled"], abs=0.051)
        assert measured.raw_pixels == pytest.approx(figures["pixels"], abs=0.051)
        assert measured.whitened_pixels == pytest.approx(figures["whitened_pixels"], abs=0.051)
    text = suggest_recipe.expected(REGIMES["resnet cpu below 64"].measured)
    assert text == (
        "k-NN 49.4 % was reached on 10000 images of CIFAR-10 in 40 epochs (untrained 30 %, raw pixels 39.2 %, "
        "PCA-whitened pixels 45.8 %)"
    )


@pytest.mark.parametrize("name", [name for name, regime in REGIMES.items() if regime.measured is not None])
def test_a_regime_has_the_settings_of_its_measured_run(tmp_path, monkeypatch, name):
    regime = REGIMES[name]
    images = Images(regime.measured.images, 32, {"name": "folder", "path": "images"}, False)
    monkeypatch.setattr(suggest_recipe, "look_at", lambda path: images)
    monkeypatch.setattr(suggest_recipe, "regime_of", lambda *about, masked: name)
    recipe = parsed(tmp_path, suggest_recipe.suggest("images", CPU).text)
    command = json.loads((RESULTS / regime.measured.result).read_text())["record"]["command"]
    assert command.startswith("maskwise train --data cifar10-jpeg-small"), "the recipe that it chose is shipped, too"
    measured = read_recipe("pretrain/cifar10_small_dino", try_model=False)
    free = {"train.epochs", "train.log_every", "optimizer.warmup_epochs", "backbone.image_size"}
    different = {key for key, value in recipe.values.items() if measured.values.get(key) != value}
    assert {key for key in different if key.partition(".")[0] not in ("data", "evaluate")} <= free


def test_several_ranks_on_cpus_get_a_network_without_batch_norm(monkeypatch):
    images = Images(10_000, 32, {"name": "folder", "path": "images"}, False)
    monkeypatch.setattr(suggest_recipe, "look_at", lambda path: images)
    monkeypatch.setattr(suggest_recipe, "world_size", lambda: 2)
    suggestion = suggest_recipe.suggest("images", CPU)
    assert "2 CPU ranks: iBOT with AttMask-High on a small ViT" in suggestion.reasons[0]
    assert suggest_recipe.suggest("images", GPU).reasons[0].endswith("DINO on ResNet-18, 32-px crops")


def test_labeled_images_without_a_test_split_hold_some_out(tmp_path):
    plain = suggest_recipe.look_at(folder(tmp_path / "plain", count=20, splits=()))
    assert (plain.count, plain.held, plain.keys["holdout"]) == (36, 4, 0.1)
    suggestion = suggest_recipe.suggest(tmp_path / "plain", CPU)
    recipe = parsed(tmp_path, suggestion.text)
    assert recipe.data.holdout == 0.1 and recipe.evaluate.knn_every > 0
    assert len(build.dataset(recipe)) == 36 and len(build.dataset(recipe, "test")) == 4
    assert "  evaluate: k-NN on 4 images that are held out and not trained" in "\n".join(suggestion.reasons)
    few = suggest_recipe.look_at(folder(tmp_path / "few", count=9, splits=()))
    assert (few.count, few.held) == (18, 0) and "holdout" not in few.keys


@pytest.mark.parametrize(
    "seconds, words", [(6.34, "6.3 seconds"), (3_141, "52 minutes"), (10_800, "3 hours"), (400_000, "4.6 days")]
)
def test_durations(seconds, words):
    assert suggest_recipe.in_words(seconds) == words


def test_cost_follows_from_the_measured_rate(monkeypatch):
    measurement = Measurement(64, 64, step=1.5, loading=0.5, memory=0, workers=0, images=640)
    monkeypatch.setattr(suggest_recipe, "measure", lambda recipe, seconds, world: measurement)
    recipe = read_recipe("debug/tiny", "train.batch_size=64", "train.epochs=90", try_model=False)
    # 900 steps of 2 s
    assert suggest_recipe.cost(recipe, CPU) == (
        "about 30 minutes on this machine (32 images/s), evaluations not included"
    )


def test_published_settings_for_a_gpu_and_a_large_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(
        suggest_recipe, "look_at", lambda path: Images(1_281_167, 400, {"name": "folder", "path": "images"}, True)
    )
    recipe = parsed(tmp_path, suggest_recipe.suggest("images", GPU).text)
    published = read_recipe("pretrain/attmask_hint_vits16")
    for key in (
        "crops.global_size",
        "crops.local_size",
        "crops.local_number",
        "backbone.name",
        "head.prototypes",
        "head.norm_last_layer",
        "masking.name",
        "masking.ratio",
        "teacher.momentum",
        "teacher.temp",
        "teacher.warmup_temp_epochs",
        "optimizer.lr",
        "train.batch_size",
        "train.epochs",
    ):
        assert recipe.values[key] == published.values[key], key
    assert recipe.crops.global_scale == published.crops.global_scale


def test_splits_and_labels_are_detected(tmp_path):
    images = suggest_recipe.look_at(folder(tmp_path / "both"))
    assert (
        images.count == 12
        and images.side == 30
        and images.labeled
        and images.keys["split"] == "train"
        and images.keys["test_split"] == "val"
    )
    plain = suggest_recipe.look_at(folder(tmp_path / "plain", splits=()))
    assert plain.count == 12 and plain.labeled and "split" not in plain.keys
    bare = suggest_recipe.look_at(folder(tmp_path / "bare", classes=(), splits=("train", "test")))
    assert bare.count == 6 and not bare.labeled and "test_split" not in bare.keys
    part = folder(tmp_path / "part", classes=("a", "é"), splits=("train",))
    folder(part, classes=(unicodedata.normalize("NFD", "é"),), splits=("val",))
    assert suggest_recipe.look_at(part).keys["test_split"] == "val"  # a part of the classes, in another Unicode form
    folder(part, classes=("c",), splits=("val",))
    assert "test_split" not in suggest_recipe.look_at(part).keys
    classes = suggest_recipe.look_at(folder(tmp_path / "odd", classes=(), splits=("train", "tram")))
    assert classes.count == 12 and classes.labeled  # a class called train
    (tmp_path / "list.txt").write_text("\n".join(f"plain/a/{i}.png" for i in range(6)))
    listed = suggest_recipe.look_at(tmp_path / "list.txt")
    assert listed.count == 6 and listed.keys["name"] == "list"


def test_unusable_folders_are_one_line_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "one", classes=(), splits=(), count=1)
    (tmp_path / "bad").mkdir()
    for k in range(3):
        (tmp_path / "bad" / f"{k}.jpg").write_text("no picture")
    for name, words in (
        ("gone", "does not exist"),
        ("empty", "is empty"),
        ("one", "has only one image"),
        ("bad", "none of the 3 images tried can be read"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            suggest_recipe.suggest(tmp_path / name, CPU)
        assert "\n" not in str(caught.value)


def test_the_command_chooses_writes_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mine", count=20)
    short = ["backbone.channels=[8,8,8,8]", "head.hidden=16", "head.prototypes=8", "head.bottleneck=8"]
    short += ["train.epochs=2", "train.steps=2", "evaluate.pictures_every=0"]
    assert main(["train", "--data", "mine", *short]) == 0
    printed = capsys.readouterr().out
    for text in (
        "40 labeled images of about 30 px",
        "DINO on a narrow ResNet-18",
        "momentum",
        "recipe: runs/mine.yaml",
    ):
        assert text in printed, text
    assert "\n  expected: k-NN" in printed and "\ncost: about " in printed
    assert "complete: 2 steps in runs/mine" in printed
    assert read_recipe("runs/mine.yaml").data.keywords()["path"] == str(tmp_path / "mine")
    assert main(["train", "--data", "mine", *short]) == 0
    again = capsys.readouterr().out
    assert "from an earlier start" in again and "cost:" not in again
    assert main(["train", "--data", "mine", "--masked", *short]) == 2
    assert "runs/mine.yaml was chosen without --masked" in capsys.readouterr().err
    assert main(["train", "debug/tiny", "--masked", "--out", "x"]) == 2
    assert "leave it out with RECIPE" in capsys.readouterr().err
    other = ["data.split=train", "train.steps=1", "train.epochs=1", "evaluate.knn_every=0"]
    other += ["optimizer.warmup_epochs=0", "teacher.warmup_temp_epochs=0"]
    assert main(["train", "debug/tiny", "--data", "mine", "--out", "other", *other]) == 0
    assert read_recipe("other").data.keywords()["path"] == "mine"


def test_command_with_too_few_images(capsys):
    assert main(["train"]) == 2 and "give a RECIPE, or --data FOLDER" in capsys.readouterr().err
    assert main(["train", "debug/tiny"]) == 2 and "give --out DIR" in capsys.readouterr().err
    assert (
        main(["train", "--data", "nowhere", "--out", "x"]) == 2 and "nowhere does not exist" in capsys.readouterr().err
    )


def test_the_command_with_masks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mine", count=20)
    short = ["backbone.depth=1", "backbone.embed_dim=24", "backbone.num_heads=2", "head.hidden=16"]
    short += ["head.prototypes=16", "train.steps=1", "evaluate.knn_every=0", "evaluate.pictures_every=0"]
    assert main(["train", "--data", "mine", "--masked", *short]) == 0
    assert "iBOT with AttMask-High on a small ViT" in capsys.readouterr().out
    assert read_recipe("runs/mine").masking.name == "attmask_high"


def test_fewer_epochs_of_a_chosen_recipe_shorten_its_warm_ups(tmp_path):
    (tmp_path / "chosen.yaml").write_text(suggest_recipe.suggest(folder(tmp_path / "mine", count=20), CPU).text)
    recipe = read_recipe(tmp_path / "chosen.yaml", "train.epochs=2")
    assert recipe.values["optimizer.warmup_epochs"] == 0.1  # 10 of 200
    assert recipe.notes == ("schedules of 200 epochs shortened to 2: optimizer.warmup_epochs 10 to 0.1",)
    assert (
        recipe.origin("optimizer.warmup_epochs")
        == f"was 10.0, {tmp_path / 'chosen.yaml'}:" + (recipe.origin("optimizer.warmup_epochs").rpartition(":")[2])
    )
    with pytest.raises(UserError, match="learning-rate warm-up"):
        read_recipe(tmp_path / "chosen.yaml", "train.epochs=2", "optimizer.warmup_epochs=3")

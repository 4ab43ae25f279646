"""Test images of the evaluations during training: their classes meet those of the training images by name."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import maskwise
from maskwise import build
from maskwise.build.evaluations import evaluations
from maskwise.build.inputs import labeled_test
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from support.tiny_sets import tiny_encoder

COLORS = {"a": (250, 10, 10), "b": (10, 250, 10), "c": (10, 10, 250), "d": (250, 250, 10)}


def flat_images(root, classes, per_class=2):
    """Images of one color each, a color for each class."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", (24, 24), COLORS[name]).save(root / name / f"{i}.png")


def opened(tmp_path, trained, tested, *overrides):
    flat_images(tmp_path / "train", trained), flat_images(tmp_path / "val", tested)
    data = ("data.name=folder", f"data.path={tmp_path}", "data.split=train", "data.test_split=val")
    recipe = read_recipe("debug/tiny", *data, *overrides)
    images = build.dataset(recipe)
    return recipe, images, labeled_test(recipe, images)


def test_knn_during_training_matches_classes_by_name(tmp_path):
    recipe, images, test = opened(tmp_path, "abc", "bc", "evaluate.knn_every=1", "evaluate.k=[1]")
    method = SimpleNamespace(teacher=SimpleNamespace(encoder=tiny_encoder()))
    report = evaluations(recipe, images, test, World())["knn"](method)
    assert report.numbers["top1"] == 100.0


@pytest.mark.parametrize("evaluation", ["evaluate.knn_every=1", "evaluate.also=[linear]"])
def test_unknown_classes_are_refused_before_training(tmp_path, evaluation):
    overrides = ("evaluate.knn_every=0", evaluation) if "also" in evaluation else (evaluation,)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "abc", "bd", *overrides)
    assert str(caught.value) == (
        f"{evaluation.partition('=')[0]}: the test images ({tmp_path / 'val'}) have 1 class unknown to the training "
        "images: d; give both the same class names, or leave these classes out"
    )


def test_evaluations_of_the_test_images_alone_accept_other_classes(tmp_path):
    _, _, test = opened(tmp_path, "abc", "bd", "evaluate.knn_every=0", "evaluate.also=[clustering]")
    assert test.classes == ["b", "d"]


HELD_OUT = ("data.name=folder", "data.holdout=0.25", "evaluate.knn_every=1", "evaluate.k=[1]")


def test_held_out_images_are_evaluated_and_not_trained(tmp_path):
    flat_images(tmp_path / "photos", "abc", per_class=8)
    recipe = read_recipe("debug/tiny", *HELD_OUT, f"data.path={tmp_path / 'photos'}")
    images = build.dataset(recipe)
    test = labeled_test(recipe, images)
    assert (len(images), len(test)) == (18, 6) and test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    trained, tested = ({part.name(index) for index in range(len(part))} for part in (images, test))
    assert not trained & tested and len(trained | tested) == 24
    method = SimpleNamespace(teacher=SimpleNamespace(encoder=tiny_encoder()))
    report = evaluations(recipe, images, test, World())["knn"](method)
    assert report.numbers["top1"] == 100.0


def test_held_out_images_of_a_run(tmp_path, capsys):
    flat_images(tmp_path / "photos", "abcd", per_class=8)
    small = ("train.steps=2", "train.batch_size=4", "optimizer.warmup_epochs=0", "evaluate.pictures_every=0")
    recipe = read_recipe("debug/tiny", *HELD_OUT, *small, f"data.path={tmp_path / 'photos'}")
    maskwise.train(recipe, out=tmp_path / "run")
    assert "8 of 32 images are held out for evaluations (data.holdout=0.25)" in capsys.readouterr().err
    during = json.loads(next((tmp_path / "run" / "reports").glob("knn*.json")).read_text())
    after = maskwise.evaluate("knn", tmp_path / "run", k=[1])
    assert after.numbers["top1"] == during["numbers"]["top1"] and after.protocol["queries"] == 8
    again = read_recipe("debug/tiny", *HELD_OUT, *small, f"data.path={tmp_path / 'photos'}", "data.holdout=0.5")
    with pytest.raises(UserError, match="was trained with data.holdout=0.25, not 0.5"):
        maskwise.train(again, out=tmp_path / "run")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data=folder", "data.path=photos", "data.test_path=other"], "the test images are those of data.test_path"),
        (["data=folder", "data.path=photos", "data.test_split=val"], "give data.test_split=null, or leave this out"),
        (["data=shapes"], "`shapes` makes its own test images"),
    ],
)
def test_held_out_images_beside_other_test_images_are_refused(overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        read_recipe("debug/tiny", "data.holdout=0.1", *overrides)
    assert "\n" not in str(caught.value)

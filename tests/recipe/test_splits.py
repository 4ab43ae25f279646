"""Subfolders that a recipe names for any data, and a folder that lacks them."""

import pytest
from PIL import Image

from maskwise import build
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

SHIPPED = "attmask/100pct_hint"  # split: train, test_split: val, k-NN every twenty epochs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a function that makes photos/ with images in the subfolders named."""
    monkeypatch.chdir(tmp_path)

    def of(*names):
        for name in names:
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            for number in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{number}.png")
        return tmp_path / "photos"

    return of


def read(*overrides):
    return read_recipe(SHIPPED, "data.path=photos", *overrides, try_model=False)


def chosen(recipe):
    return recipe.data.keywords()["split"], recipe.data.test_split, recipe.evaluate.knn_every


def test_a_folder_of_images(folder):
    folder(".")
    recipe = read()
    assert chosen(recipe) == (None, None, 0) and len(build.dataset(recipe)) == 2
    assert recipe.notes == (
        "photos has no subfolder train/: the images in it are the training images",
        "photos has no subfolder val/: nothing is evaluated during training",
    )
    assert build.labeled_test(recipe, build.dataset(recipe)) is None


def test_a_folder_of_classes(folder):
    folder("cats", "dogs")
    recipe = read()
    assert chosen(recipe) == (None, None, 0) and build.dataset(recipe).classes == ["cats", "dogs"]


def test_a_folder_with_both_subfolders(folder):
    folder("train/cats", "val/cats")
    recipe = read()
    assert chosen(recipe) == ("train", "val", 20) and recipe.notes == () and len(build.dataset(recipe)) == 2


def test_a_folder_without_test_images(folder):
    folder("train/cats")
    recipe = read()
    assert chosen(recipe) == ("train", None, 0)
    assert recipe.notes == ("photos has no subfolder val/: nothing is evaluated during training",)
    with pytest.raises(UserError, match="^command line: evaluate.knn_every: k-NN needs labeled test images"):
        read("evaluate.knn_every=3")


def test_subfolders_of_other_names_are_not_mixed(folder):
    folder("training/cats", "validation/cats")
    with pytest.raises(UserError) as caught:
        build.dataset(read())
    assert str(caught.value) == (
        "photos has no subfolder train/; it has training, validation: set data.split to one of them, or set "
        "data.split=null for all images in photos"
    )
    recipe = read("data.split=training")
    with pytest.raises(UserError) as caught:
        build.dataset(recipe, "test")
    assert str(caught.value) == (
        "test images: photos has no subfolder val/; it has training, validation: set data.test_split to one of them, "
        "or set data.test_split=null for no evaluation during training"
    )
    assert chosen(read("data.split=training", "data.test_split=validation")) == ("training", "validation", 20)
    assert chosen(read("data.split=training", "data.test_split=null")) == ("training", None, 0)


def test_a_split_on_the_command_line_is_meant(folder):
    folder(".")
    recipe = read("data.split=train")
    with pytest.raises(
        UserError, match="^photos has no subfolder train/; set data.split=null for all images in photos$"
    ):
        build.dataset(recipe)
    elsewhere = read("data.test_path=elsewhere")  # to be made later
    assert chosen(elsewhere) == (None, "val", 20)
    with pytest.raises(UserError, match="^test images: data.test_path: elsewhere does not exist"):
        build.dataset(elsewhere, "test")


def test_a_folder_of_test_images_of_its_own(folder):
    folder("train/cats", "../test_images/cats")
    recipe = read("data.test_path=test_images")
    assert chosen(recipe) == ("train", None, 20)
    assert recipe.notes == ("test_images has no subfolder val/: the images in it are the test images",)
    assert len(build.dataset(recipe, "test")) == 2


def test_supervised_recipes_too(folder):
    folder("cats", "dogs")
    recipe = read_recipe("supervised/vits16_gap", "data.path=photos", try_model=False)
    assert recipe.data.keywords()["split"] is None and recipe.evaluate.top1_every == 0


def test_held_out_images_in_place_of_an_absent_subfolder(folder):
    folder("cats", "dogs")
    recipe = read("data.holdout=0.5")
    assert chosen(recipe) == (None, None, 20) and len(build.dataset(recipe, "test")) == 2
    assert recipe.notes[1] == (
        "photos has no subfolder val/: a part of the training images is held out for evaluations"
    )

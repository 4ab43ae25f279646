"""`maskwise train`: paths of the command line."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from maskwise import api, cli
from maskwise.data.datasets.left_out import is_own
from maskwise.recipe.reading import read_recipe

SMALL = ("train.epochs=1", "train.batch_size=4", "optimizer.warmup_epochs=0", "teacher.warmup_temp_epochs=0")
SMALL = (*SMALL, "evaluate.knn_every=0", "evaluate.pictures_every=0")


def photos(root, count=4, value=0, size=40):
    """A folder of small flat images without classes."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (size, size), (value, 9 * number % 256, 7)).save(Path(root) / f"{number:03d}.png")
    return root


@pytest.fixture
def main(capfd, monkeypatch, tmp_path):
    """Run a command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def of(*words):
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        return (status, *capfd.readouterr())

    return of


@pytest.mark.parametrize("name", ["photos #2", "'photos'", "!photos", "&photos", "[2021]", "null", "photos ", "a: b"])
def test_data_is_the_word_as_it_is(main, name):
    photos("photos", 8)
    photos(name, 4)
    assert main("train", "debug/tiny", "--data", name, "--out", "run", *SMALL)[0] == 0
    assert read_recipe("run").values["data.path"] == name
    assert json.loads(Path("run/run.json").read_text())["images"] == 4
    assert main("train", "debug/tiny", "data=folder", f"data.path={name}", "--out", "run", *SMALL)[:2] == (
        0,
        "complete: 1 steps in run\n",
    )


def test_options_of_evaluations_are_the_words_as_they_are(main, monkeypatch):
    given = {}
    monkeypatch.setattr(api, "evaluate", given_to(given, api.evaluate))
    words = ("train=photos #2", "test=[2021]", "cache='c'", "save=~/probe", "k=[1,5]")
    with pytest.raises(Stop):
        main("evaluate", "linear", "run", *[word for word in words if not word.startswith("k=")])
    assert given == {"train": "photos #2", "test": "[2021]", "cache": "'c'", "save": os.path.expanduser("~/probe")}
    with pytest.raises(Stop):
        main("evaluate", "knn", "run", "train=null", "k=[1,5]")
    assert given == {"train": "null", "k": (1, 5)}


def test_a_recipe_chosen_for_other_images_is_not_used(main):
    photos("A/photos", 40)
    photos("B/photos", 48, value=90)
    tiny = ("backbone.channels=[8,8,8,8]", "head.hidden=16", "train.epochs=1", "train.batch_size=4")
    assert main("train", "--data", "A/photos", *tiny)[0] == 0
    before = Path("runs/photos.yaml").read_text()
    status, out, error = main("train", "--data", "B/photos", *tiny)
    moved = "`maskwise train runs/photos.yaml --out runs/photos data.path=B/photos`"
    assert (status, out) == (2, "") and error == (
        f"maskwise: runs/photos.yaml was chosen for {Path('A/photos').resolve()}: give another --out for B/photos; or, "
        f"if these are the same images in another place, {moved}\n"
    )
    assert Path("runs/photos.yaml").read_text() == before
    other = main("train", "runs/photos.yaml", "--out", "runs/photos", "data.path=B/photos", *tiny)
    assert other[0] == 2 and "B/photos has others (48 images, not 40)" in other[2]
    assert main("train", "--data", "B/photos", "--out", "runs/B", *tiny)[0] == 0
    assert json.loads(Path("runs/B/run.json").read_text())["images"] == 48
    Path("A/photos").rename("moved")
    again = main("train", "runs/photos.yaml", "--out", "runs/photos", "data.path=moved", *tiny)
    assert again[:2] == (0, "complete: 10 steps in runs/photos\n")


def test_a_run_below_its_images_is_no_part_of_them(main, tmp_path, monkeypatch):
    for name in ("cats", "dogs"):
        photos(f"photos/{name}", 20, value=len(name) * 20)
    monkeypatch.chdir(tmp_path / "photos")
    short = ("backbone.depth=1", "backbone.embed_dim=24", "backbone.num_heads=2", "head.hidden=16", "train.epochs=1")
    short = ("--masked", *short)
    status, out, error = main("train", "--data", ".", *short)
    assert status == 0 and "40 labeled images" in out
    assert "runs/photos lies in the folder of the images; run folders are left out of them" in error
    assert list(Path("runs/photos/pictures").glob("*.png"))
    assert main("train", "--data", ".", *short)[:2] == (
        0,
        "recipe: runs/photos.yaml, from an earlier start; remove it to have a new one chosen\n"
        "complete: 9 steps in runs/photos\n",
    )
    status, out, error = main("train", "--data", ".", "--out", "runs/again", *short)
    assert status == 0 and "40 labeled images" in out
    assert json.loads(Path("runs/again/run.json").read_text())["images"] == 36  # a tenth is held out
    assert "1 folder of a run, an export or evaluations" in error


def test_a_run_in_the_very_folder_of_its_images_is_refused(main):
    photos("photos", 4)
    status, out, error = main("train", "debug/tiny", "--data", "photos", "--out", "photos", *SMALL)
    line = "maskwise: --out photos lies in the folder of the images, photos: give one beside it\n"
    assert (status, error) == (2, line) and len(list(Path("photos").iterdir())) == 4
    assert main("train", "debug/tiny", "--data", "photos", "--out", "run", *SMALL)[0] == 0
    line = "run is a folder of a run, an export or evaluations; give the folder that holds the images"
    assert main("train", "debug/tiny", "--data", "run", "--out", "other", *SMALL)[2] == f"maskwise: data.path: {line}\n"


def test_changed_images_are_accepted_by_a_flag(main):
    photos("photos", 8)
    words = ("train", "debug/tiny", "--data", "photos", "--out", "run", *SMALL)
    assert main(*words)[0] == 0
    photos("photos", 12)
    assert main(*words)[0] == 2
    assert main(*words, "--accept-changed-data")[:2] == (0, "complete: 2 steps in run\n")


class Stop(Exception):
    """Ends a command where its arguments are known."""


def given_to(record, function):
    """Return a function with the signature of `function` that records its options."""
    import functools

    @functools.wraps(function)
    def recording(name, model, **options):
        record.clear()
        record.update(options)
        raise Stop

    return recording


def test_the_home_folder_in_paths(main, tmp_path):
    photos(tmp_path / "home" / "photos")
    assert main("train", "debug/tiny", "--data=~/photos", "--out=~/run", *SMALL)[0] == 0
    assert main("train", "debug/tiny", "data=folder", "data.path=~/photos", "--out=~/r2", *SMALL)[0] == 0
    assert main("export", "~/run", "--to=~/exported")[0] == 0
    assert is_own({path.name for path in (tmp_path / "home" / "exported").iterdir()})
    picture = tmp_path / "home" / "photos" / "000.png"
    assert main("look", "~/exported", picture, "--out=~/sheet.png")[0] == 0
    made = sorted(path.name for path in (tmp_path / "home").iterdir() if not path.name.startswith("."))
    assert made == ["exported", "photos", "r2", "run", "sheet.png"]
    assert not (tmp_path / "~").exists()

"""evaluate, evaluate all and look read a weights file with the options of maskwise.load."""

import inspect
import json

import pytest
import torch

import maskwise
from maskwise import api
from maskwise.cli import main as command
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from support.benchmark_folders import class_folders
from support.research_files import training_file, vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone of width 48 with three heads, a training file of SimPool, and images in class folders."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save({"teacher": vit(dim=48)}, root / "narrow.pth")
    torch.save(training_file("simpool"), root / "simpool.pth")
    for split in ("train", "val"):
        class_folders(root / "photos" / split, ("a", "b"), 3)
    return root


@pytest.fixture
def main(capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)

    def of(*words):
        capsys.readouterr()
        return command(list(words)), capsys.readouterr().err

    return of


def diversity(encoder, images):
    return api.evaluate("analysis", encoder, test=images, parts=("diversity",)).numbers["spatial_diversity"]


def test_no_option_of_an_evaluation_has_the_name_of_one_of_the_model():
    for row in EVALUATIONS.values():
        assert not set(api.MODEL_OPTIONS) & set(row.option_names)
    for function in (api.evaluate, api.evaluate_all, api.look):
        named = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
        assert not set(api.MODEL_OPTIONS) & set(named)


@pytest.mark.parametrize(
    "file, options, other",
    [
        ("narrow.pth", {"num_heads": 3, "image_size": 32}, {"num_heads": 2, "image_size": 32}),
        ("simpool.pth", {"num_heads": 2, "gamma": 2.0, "weights": "student"}, {"num_heads": 1, "gamma": 2.0}),
    ],
)
def test_evaluate_reads_the_file_with_these_options(main, folder, file, options, other):
    words = [f"{key}={value}" for key, value in options.items()]
    status, error = main(
        "evaluate", "analysis", file, "test=photos/val", "parts=[diversity]", "--out", "r.json", *words
    )
    assert status == 0, error
    report = json.loads((folder / "r.json").read_text())
    expected, different = (diversity(maskwise.load(file, **given), "photos/val") for given in (options, other))
    assert report["numbers"]["spatial_diversity"] == pytest.approx(expected) and expected != pytest.approx(different)
    assert report["protocol"]["loaded_with"] == options


def test_evaluate_all_reads_the_file_with_these_options(main, folder):
    pytest.importorskip("sklearn")
    status, error = main(
        "evaluate", "all", "narrow.pth", "--data", "photos", "num_heads=3", "image_size=32", "--out", "o"
    )
    assert status == 0, error
    report = json.loads((folder / "o" / "reports" / "clustering_photos.json").read_text())
    encoder = maskwise.load("narrow.pth", num_heads=3, image_size=32)
    expected = api.evaluate("clustering", encoder, test="photos/val").protocol["inertia"]
    assert report["protocol"]["inertia"] == pytest.approx(expected)


def test_look_reads_the_file_with_these_options(main, folder):
    image = "photos/val/a/0000.JPEG"
    assert main("look", "narrow.pth", image, "--out", "3.png", "num_heads=3", "image_size=32")[0] == 0
    for heads, same in ((3, True), (1, False)):
        api.look(maskwise.load("narrow.pth", num_heads=heads, image_size=32), [image], "drawn.png")
        assert ((folder / "3.png").read_bytes() == (folder / "drawn.png").read_bytes()) is same


def test_mistakes_are_one_line(main):
    assert main("evaluate", "knn", "narrow.pth", "num_heads=3", "num_heads=2") == (
        2,
        "maskwise: evaluate knn: num_heads is given twice; keep one\n",
    )
    encoder = maskwise.load("narrow.pth", num_heads=3, image_size=32)
    for call in (
        lambda: api.evaluate("knn", encoder, train="photos/train", test="photos/val", num_heads=2),
        lambda: api.look(encoder, ["photos/val/a/0000.JPEG"], "x.png", num_heads=2),
        lambda: api.evaluate_all(encoder, "photos", "o", num_heads=2),
    ):
        with pytest.raises(UserError, match="num_heads is an option of maskwise.load; give it there, or give"):
            call()

"""Training on images given in Python: exact resume, ranks and workers, refusals, evaluations, embeddings."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise import build, cli
from maskwise.build.images import recipe_of_given
from maskwise.data import loader
from maskwise.data.datasets.torch_dataset import RawItems, TorchDataset
from maskwise.data.own_crops import OwnCrops
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from support.figures import Noise, crops, other_crops

TINY = (
    *("crops.global_size=16", "crops.local_size=8", "crops.local_number=2", "backbone.image_size=16"),
    *("backbone.patch_size=4", "train.batch_size=4", "train.steps=4", "train.save_every=1", "train.log_every=1"),
    *("optimizer.warmup_epochs=0", "teacher.warmup_temp_epochs=0", "optimizer.freeze_last_layer=0"),
    *("evaluate.k=[3]", "evaluate.baselines=false", "evaluate.pictures_every=0", "train.loggers=null"),
    "evaluate.knn_every=10",
)
GIVEN = read_recipe("debug/tiny", "data.name=python", *TINY)
TIMES = ("img_s", "data_wait", "seconds")


class Stop(Exception):
    """The end of a start of a run."""


def numbers(folder):
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on 12 images with own crops, in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = maskwise.train(GIVEN, folder, dataset=Noise(12), test=Noise(6, seed=1), transform=crops, quiet=True)
    assert result["status"] == "complete"
    return folder


def test_a_continued_run_with_workers_equals_the_uninterrupted_one(whole, tmp_path, monkeypatch):
    step, folder = Trainer.step, tmp_path / "run"

    def stopping(self, *batch, **options):
        if self.step_index == 2:
            raise Stop
        return step(self, *batch, **options)

    options = {"dataset": Noise(12), "test": Noise(6, seed=1), "transform": crops, "quiet": True}
    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Stop):
        maskwise.train(GIVEN, folder, **options)
    monkeypatch.setattr(Trainer, "step", step)
    recipe = read_recipe("debug/tiny", "data.name=python", *TINY, "speed.workers=2")
    assert maskwise.train(recipe, folder, **options)["status"] == "complete"
    assert numbers(folder) == numbers(whole) and len(numbers(whole)) == 5
    for name in ("model", "optimizer"):
        one, other = (
            load_file(run / "checkpoints" / "step_00000004" / f"{name}.safetensors") for run in (whole, folder)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_is_continued_only_with_its_images_and_its_transform(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["transform"] == "crops" and record["data"].keys() == {"count", "pixels"}
    assert "name: python" in (whole / "recipe.yaml").read_text()
    again = {"dataset": Noise(12), "transform": crops, "quiet": True}
    for changes, line in (
        ({"transform": other_crops}, "with transform crops, not transform other_crops"),
        ({"transform": None}, "with transform crops, not multi-crop"),
        ({"dataset": Noise(12, seed=9)}, "other pixels"),
        ({"dataset": Noise(15)}, "15 images, not 12"),
        ({"dataset": None}, "given in Python"),
    ):
        with pytest.raises(UserError, match=line):
            maskwise.train(GIVEN, whole, **{**again, **changes})
    assert maskwise.train(GIVEN, whole, **again)["status"] == "complete"


def test_evaluations_take_datasets_and_name_them_as_the_remedy(whole):
    encoder = maskwise.load(whole)
    report = maskwise.evaluate("knn", encoder, train=Noise(12), test=Noise(6, seed=1), k=[3])
    during = json.loads((whole / "reports" / "knn_step_00000004.json").read_text())
    assert report.numbers["top1"] == during["numbers"]["top1"]
    with pytest.raises(UserError, match=r"given in Python, .*train=..., test="):
        maskwise.evaluate("knn", str(whole))


def test_embeddings_of_a_dataset_equal_the_encoder(whole, tmp_path):
    encoder = maskwise.load(whole)
    maskwise.embed(encoder, Noise(3), tmp_path / "vectors.npy")
    with torch.no_grad():
        direct = encoder(torch.stack([encoder.transform(Noise(3)[index][0]) for index in range(3)])).pooled
    numpy.testing.assert_allclose(numpy.load(tmp_path / "vectors.npy"), direct.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [None, crops])
def test_ranks_and_workers_share_one_order(transform):
    views = build.views(GIVEN) if transform is None else OwnCrops(transform, seed=0, **sizes())
    data = TorchDataset(Noise(9))
    data = data if transform is None else RawItems(data)

    def batches(**options):
        options = {"batch_size": 4, "total_steps": 3, "cache": "none", **options}
        stream = loader.batches(data, views, **options)
        result = list(stream)
        stream.close()
        return result

    alone, workers = batches(), batches(workers=1)
    shares = [batches(rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        assert torch.equal(alone[step].global_crops, workers[step].global_crops)
        assert alone[step].labels.tolist() == [index % 3 for index in alone[step].index.tolist()]
        for view in range(2):
            rows = [share[step].global_crops[2 * view : 2 * view + 2] for share in shares]
            assert torch.equal(alone[step].global_crops[4 * view : 4 * view + 4], torch.cat(rows))


def sizes():
    return {"global_size": 16, "local_size": 8, "local_number": 2}


def test_a_given_dataset_takes_the_place_of_the_images_of_a_recipe(tmp_path):
    recipe = read_recipe("debug/tiny", *TINY, "evaluate.knn_every=0")
    given = recipe_of_given(recipe)
    assert given.data.name == "python" and recipe_of_given(given) is given
    (tmp_path / "recipe.yaml").write_text(given.resolved_yaml())
    again = read_recipe(tmp_path)
    assert again.values == given.values and "data.count" not in given.values


def test_mistakes_end_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "debug/tiny", "data.name=python", "--out", str(out)]) == 2
    assert "given in Python, by maskwise.train(recipe, out=..., dataset=...)" in capsys.readouterr().err
    data = {"dataset": Noise(12), "quiet": True}
    for options, line in (
        ({**data, "transform": lambda image: [image] * 2}, "transform returned 2 crops"),
        ({**data, "transform": 3}, "transform= is a int"),
        ({"dataset": [1.0]}, "this is a list"),
        ({"dataset": Noise(2)}, "there are only 2 images"),
    ):
        with pytest.raises(UserError, match=line):
            maskwise.train(GIVEN, out, **options)
    assert not out.exists()


class Faulty(Noise):
    def __getitem__(self, index):
        if index == 4:
            raise KeyError("row")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_is_one_line_from_every_process(tmp_path, workers):
    # item 4 is not among the sixteen that identify the set
    words = ("train.steps=10", "train.save_every=10", f"speed.workers={workers}", "speed.cache=none")
    recipe = read_recipe("debug/tiny", "data.name=python", *TINY, *words)
    with pytest.raises(UserError, match=r"dataset\[4\] raised KeyError: 'row'"):
        maskwise.train(recipe, tmp_path / "run", dataset=Faulty(40), quiet=True)

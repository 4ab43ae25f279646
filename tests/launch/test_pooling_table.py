"""Script of the pooling table in miniature: recipes, an interrupted measurement, table and plot."""

import json
import os

import pytest
from PIL import Image

from launch.reproduce import pooling_experiments, pooling_report, pooling_table
from maskwise.bench.table1 import TABLE1
from maskwise.imaging.charts import interval_chart
from maskwise.nn import POOLINGS
from maskwise.recipe.reading import read_recipe


@pytest.fixture
def packs(tmp_path):
    """Every pack as a folder of few small pictures."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "pack" / split / label
            folder.mkdir(parents=True)
            for k in range(12):
                Image.new("RGB", (40, 48), (20 * k, 20, 200 if label == "a" else 0)).save(folder / f"{k}.png")
    return {
        experiment.pack: tmp_path / "pack"
        for profile in pooling_experiments.PROFILES.values()
        for experiment in profile.values()
    }


def test_every_experiment_row_is_a_valid_recipe(packs, monkeypatch):
    monkeypatch.setenv("MASKWISE_MODULES", "launch.reproduce.decoded_folder")
    cpu, gpu = (list(pooling_table.tasks(profile, packs)) for profile in ("cpu", "gpu"))
    assert len(cpu) == 3 * (15 + 15 + 3) and len(gpu) == 45 and len({task.key for task in cpu + gpu}) == len(cpu + gpu)
    assert set(pooling_experiments.LANDSCAPE) == {name for name, row in POOLINGS.items() if row in TABLE1} and [
        task.seed for task in cpu
    ] == sorted(task.seed for task in cpu)
    first = [task for task in cpu + gpu if task.seed == 0 and task.row in ("cls", "gap", "simpool")]
    for task in first:
        recipe = read_recipe(task.recipe, *task.words)
        assert (
            recipe.pooling.name == task.row
            and recipe.seed == 0
            and recipe.data.arguments["path"] == str(packs["cifar10-jpeg-small"])
        )
    assert (
        read_recipe(next(task for task in gpu if task.row == "simpool").recipe, *gpu[14].words).pooling.keywords()[
            "gamma"
        ]
        == 2.0
    )


def test_map_experiment_has_six_classifiers_on_one_network(packs, monkeypatch):
    monkeypatch.setenv("MASKWISE_MODULES", "launch.reproduce.decoded_folder")
    steps = list(pooling_table.tasks("map", packs))
    assert len(steps) == 18 and len({task.key for task in steps}) == 18
    recipes = {task.row: read_recipe(task.recipe, *task.words) for task in steps if task.seed == 1}
    assert recipes["gap"].classifier.name == "linear" and len({recipe.seed for recipe in recipes.values()}) == 1
    distilled = {
        row: tuple(recipe.classifier.keywords()[key] for key in ("tokens", "intra", "inter"))
        for row, recipe in recipes.items()
        if row != "gap"
    }
    assert distilled == {
        "cap": (1, 0, 0),
        "token": (1, 0, 0),
        "tokens": (4, 0, 0),
        "intra": (4, 1.0, 0),
        "inter": (4, 1.0, -0.8),
    }
    assert (
        len({repr((recipe.backbone, recipe.optimizer, recipe.train, recipe.augment)) for recipe in recipes.values()})
        == 1
    )


def test_the_small_network_is_within_its_budget():
    import torch

    from maskwise.bench.network_cost import count
    from maskwise.nn import Backbone

    recipe = read_recipe(pooling_table.HERE / "pooling_table_supervised.yaml", try_model=False)
    with torch.device("meta"):
        backbone = Backbone(recipe.backbone.name, **{**recipe.backbone.keywords(), "image_size": 32})
        tokens, products, _ = count(lambda: backbone(torch.zeros(1, 3, 32, 32)))
    assert 2 * products <= 0.06e9 and tokens.grid == (4, 4)


@pytest.mark.slow
def test_interrupted_measurement_resumes(packs, tmp_path, capsys):
    out = tmp_path / "found.json"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    small = [
        task
        for task in pooling_table.tasks("cpu", packs, 2, ("gap",), miniature=True)
        if task.experiment != "imagenette"
    ]
    assert pooling_table.measure(small, out, tmp_path / "work", 1, minutes=0.0) == len(small) == 4
    half = [task for task in small if task.seed == 0]
    assert pooling_table.measure(half, out, tmp_path / "work", 1, None) == 0
    finished = json.loads(out.read_text())["runs"]
    assert set(finished) == {task.key for task in half} and not list((tmp_path / "work").glob("*"))
    assert pooling_table.measure(small, out, tmp_path / "work", 1, None) == 0
    results = json.loads(out.read_text())
    assert {key: results["runs"][key] for key in finished} == finished and len(results["runs"]) == 4
    pooling_report.report(results, out, "cpu")
    table = out.with_suffix(".md").read_text()
    assert table.count("| `gap` |") == 2 and "| 2 |" in table and out.with_suffix(".png").is_file()


def test_table_and_plot():
    runs = {
        f"cifar/{pooling}/{seed}": {"numbers": {"top1": value + seed}, "pooling_parameters": 7, "seconds": 30.0}
        for pooling, value in (("gap", 40.0), ("gem", 42.0))
        for seed in (0, 2)
    }
    table = pooling_report.table_text({"record": {"command": "c", "date": "d", "commit": "0"}, "runs": runs}, "cpu")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows == ["| `gem` | 43.00 | 1.00 | 2 | 7 | 30 | 55.9 |", "| `gap` | 41.00 | 1.00 | 2 | 7 | 30 | 55.0 |"]
    picture = interval_chart({"gap": [40.0, 42.0], "gem": [42.0, 44.0], "alone": [41.0]}, "t")
    assert picture.ndim == 3 and picture.shape[2] == 3 and len({tuple(pixel) for pixel in picture.reshape(-1, 3)}) >= 4

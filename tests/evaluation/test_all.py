import json
import os

import numpy as np
import pytest
from data.test_layouts import copydays_on_disk, cub_on_disk, inshop_on_disk
from evaluation.on_disk import class_folders, revisited, tiny_encoder
from maskwise import run_record
from maskwise.data.layouts import in9
from maskwise.evaluation import EVALUATIONS, all
from maskwise.evaluation.published import PUBLISHED, published
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError

WNIDS = ["n01440764", "n02102040", "n02110958"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything at once, as a user's data folder."""
    root = tmp_path_factory.mktemp("data")
    class_folders(root / "imagenet" / "train", WNIDS, 6)
    class_folders(root / "imagenet" / "val", WNIDS, 3, seed=7)
    class_folders(root / "imagenet-r", WNIDS[:2], 2)
    for variant in ("original", "mixed_same", "mixed_rand"):
        class_folders(root / "bg_challenge" / variant / "val", [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)], 1)
    revisited(root)
    cub_on_disk(root)
    copydays_on_disk(root / "copydays")
    inshop_on_disk(root / "inshop")
    return root


def test_what_the_data_allow_is_planned(folder, tmp_path):
    tasks = {task.name: task for task in all.plan(folder)}
    assert set(tasks) == {
        "knn_imagenet", "clustering_imagenet", "masked_imagenet", "robustness_imagenet", "backgrounds_bg_challenge", "retrieval_roxford5k",
        "recall_CUB_200_2011", "recall_inshop", "copy_detection_copydays",
    }  # fmt: skip
    assert set(tasks["robustness_imagenet"].options) == {"imagenet_r"}
    assert {"linear_imagenet", "logistic_imagenet"} <= {task.name for task in all.plan(folder, also=("linear", "logistic"))}
    with pytest.raises(UserError, match="holds nothing"):
        all.plan(tmp_path)
    with pytest.raises(UserError, match="none of linear"):
        all.plan(folder, also=("knn",))


def test_everything_at_once(folder, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    said = []
    gone = next((folder / "inshop" / "Img").rglob("*.jpg"))
    aside = gone.rename(tmp_path / gone.name)
    reports = all.everything(tiny_encoder(), folder, tmp_path / "out", recipe="simpool/vits16_dino", batch_size=16, say=said.append)
    aside.rename(gone)
    assert len(reports) == 8 and any("left out: In-Shop" in line for line in said)  # one incomplete dataset costs its own row
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| recall | inshop | left out: In-Shop: 1 of 2 images are missing" in text
    assert "| retrieval | roxford5k | papers_medium_map |" in text and "| 32.1 |" in text  # published for this recipe on this set
    assert "| backgrounds | bg_challenge | bg_gap |" in text and "| 7.5 |" in text
    for name in reports:
        assert Report.load(tmp_path / "out" / "reports" / f"{name}.json").numbers.keys() == reports[name].numbers.keys()
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["imagenet_classes.png", "imagenet_confusion.png", "imagenet_map.png", "imagenet_neighbours.png"]
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "out" / "tensorboard"))
    again = EVALUATIONS["knn"](tiny_encoder(), _knn_data(folder), feature="pooled", k=(10, 20))
    assert again.numbers == reports["knn_imagenet"].numbers  # what came from the cache is what is computed


def _knn_data(folder):
    return next(task for task in all.plan(folder) if task.evaluation == "knn").read()


def test_published_numbers_name_recipes_and_numbers_that_exist():
    from maskwise.recipe import locate

    for recipe, numbers in PUBLISHED.items():
        assert locate(recipe)[0].is_file(), recipe
        assert {key.split(".")[0] for key in numbers} <= set(EVALUATIONS)
    assert published("attmask/20pct_high", "backgrounds", "in9", "bg_gap") == 13.9
    assert published("attmask/100pct_high", "retrieval", "rparis6k", "papers_hard_map") == 31.5
    assert published("attmask/100pct_high", "knn", "imagenet", "pooled_few_shot_20") == 59.1
    assert published(None, "knn", "imagenet", "top1") is None and published("nobody", "knn", "x", "top1") is None


def test_a_run_knows_its_recipe(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "maskwise train configs/attmask/20pct_high.yaml --out runs/x"}))
    assert run_record.recipe_of(tmp_path) == "attmask/20pct_high"
    (tmp_path / "run.json").write_text(json.dumps({"command": "python my.py"}))
    assert run_record.recipe_of(tmp_path) is None and run_record.recipe_of(tmp_path / "none") is None


def test_report_keeps_seeds_and_epochs(tmp_path):
    report = Report({"top1": float("nan")}, {"k": (1, 2)}, "0" * 64, {"seconds": np.float64(1.5)}, seeds={"k-means": 3}, epochs={"best": {"epoch": 4}})
    found = Report.load(report.save(tmp_path / "r.json"))
    assert found.seeds == {"k-means": 3} and found.epochs == {"best": {"epoch": 4}} and found.numbers == {"top1": None} and found.cost == {"seconds": 1.5}

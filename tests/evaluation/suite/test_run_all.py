import json
import os
import shutil

import numpy as np
import pytest

from data.benchmark_sets.test_benchmark_sets import (
    coco_on_disk,
    copydays_on_disk,
    cub_on_disk,
    inshop_on_disk,
    voc_on_disk,
)
from maskwise import api
from maskwise.build.running import run_folder
from maskwise.data.benchmark_sets import in9
from maskwise.data.datasets.left_out import is_own
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.baselines import baselines
from maskwise.evaluation.report import Report
from maskwise.evaluation.suite import run_all
from maskwise.evaluation.suite.published import PUBLISHED, published
from support.benchmark_folders import class_folders, revisited, tiny_encoder
from support.labeled_folders import colored_halves, squares

WNIDS = ["n01440764", "n02102040", "n02110958"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with several benchmark sets."""
    root = tmp_path_factory.mktemp("data")
    class_folders(root / "imagenet" / "train", WNIDS, 6)
    class_folders(root / "imagenet" / "val", WNIDS, 3, seed=7)
    class_folders(root / "imagenet-r", WNIDS[:2], 2)
    for variant in ("original", "mixed_same", "mixed_rand"):
        class_folders(
            root / "bg_challenge" / variant / "val", [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)], 1
        )
    revisited(root)
    cub_on_disk(root)
    copydays_on_disk(root / "copydays")
    inshop_on_disk(root / "inshop")
    return root


def test_plan_lists_the_evaluations_that_the_data_allow(folder, tmp_path):
    tasks = {task.name: task for task in run_all.plan(folder)}
    assert set(tasks) == {
        "knn_imagenet",
        "clustering_imagenet",
        "masked_imagenet",
        "robustness_imagenet",
        "backgrounds_bg_challenge",
        "retrieval_roxford5k",
        "recall_CUB_200_2011",
        "localization_CUB_200_2011",
        "recall_inshop",
        "copy_detection_copydays",
    }
    assert set(tasks["robustness_imagenet"].options) == {"imagenet_r"}
    assert {"linear_imagenet", "logistic_imagenet"} <= {
        task.name for task in run_all.plan(folder, also={"linear": {}, "logistic": {}})
    }
    with pytest.raises(UserError, match="holds nothing"):
        run_all.plan(tmp_path)
    with pytest.raises(UserError, match="none of linear"):
        run_all.plan(folder, also={"knn": {}})


def test_every_evaluation_that_can_be_requested_is_planned_with_its_options(tmp_path):
    class_folders(tmp_path / "imagenet" / "train", WNIDS, 2)
    class_folders(tmp_path / "imagenet" / "val", WNIDS, 2)
    colored_halves(tmp_path / "labeled", 2, "val")
    squares(tmp_path / "coco", "val2017", 1)
    also = {name: {"batch_size": 3} for name in run_all.LONG}
    planned = {task.evaluation: task.options for task in run_all.plan(tmp_path, also=also) if task.evaluation in also}
    assert planned == also


def test_requested_evaluations_run(folder, tmp_path):
    lines = ["finetune epochs=1 warmup_epochs=0 batch_size=6 repeats=1", "attentive epochs=2 warmup_epochs=1 lr=0.1"]
    reports = api.evaluate_all(tiny_encoder(), folder / "imagenet", tmp_path, also=lines, batch_size=16, say=str)
    finetuned, attended = reports["finetune_imagenet"], reports["attentive_imagenet"]
    assert finetuned.protocol["batch_size"] == 6 and finetuned.protocol["epochs"] == 1
    assert attended.protocol["epochs"] == 2 and attended.protocol["batch_size"] == 1024
    assert "| finetune | imagenet | top1 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="finetune has no option epoch; did you mean `epochs`"):
        api.evaluate_all(tiny_encoder(), folder, tmp_path, also="finetune epoch=1")


def test_a_request_that_no_dataset_allows_is_refused(folder):
    with pytest.raises(UserError, match="also=attentive: .*copydays holds no dataset for it; it reads imagenet, cifar"):
        run_all.plan(folder / "copydays", also={"attentive": {}})


def test_the_folder_may_be_the_current_one(folder, monkeypatch):
    monkeypatch.chdir(folder / "imagenet")
    assert {task.name for task in run_all.plan(".")} == {"knn_imagenet", "clustering_imagenet", "masked_imagenet"}


@pytest.mark.parametrize("others", [("aardvarks",), ("aardvarks", "0_digits", "a_few_wordnet_ids")])
def test_in9_is_scored_by_the_folder_of_imagenet_classes(tmp_path, others):
    """Not by the first folder that has train/ and val/."""
    sets = {"aardvarks": ["aardvark", "zebra"], "0_digits": ["0", "1", "2"], "a_few_wordnet_ids": WNIDS[:2]}
    for name in (*others, "imagenet"):
        for split in ("train", "val"):
            class_folders(tmp_path / name / split, sets.get(name, WNIDS), 1)
    for variant in ("original", "mixed_same"):
        class_folders(
            tmp_path / "bg_challenge" / variant / "val", [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)], 1
        )
    task = next(task for task in run_all.plan(tmp_path) if task.evaluation == "backgrounds")
    assert task.read()["train"].root == tmp_path / "imagenet" / "train"
    assert EVALUATIONS["backgrounds"](tiny_encoder(), task.read()).protocol["mapped"] == 3


def test_in9_without_a_classifier_says_what_is_missing(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bg_challenge").symlink_to(folder / "bg_challenge")
    with pytest.raises(UserError, match="IN-9 is scored by a classifier of ImageNet's classes; put a folder"):
        run_all.run_all(tiny_encoder(), tmp_path / "data", tmp_path / "out")


def test_run_all(folder, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    messages = []
    gone = next((folder / "inshop" / "Img").rglob("*.jpg"))
    aside = gone.rename(tmp_path / gone.name)
    reports = run_all.run_all(
        tiny_encoder(),
        folder,
        tmp_path / "out",
        recipe="simpool/vits16_dino",
        batch_size=16,
        say=messages.append,
        baselines=baselines,
    )
    aside.rename(gone)
    assert len(reports) == 10 and any(
        "left out: In-Shop" in line for line in messages
    )  # an incomplete dataset fails its own task only
    text = (tmp_path / "out" / "table.md").read_text()
    assert is_own({path.name for path in (tmp_path / "out").iterdir()})  # its pictures are no data
    assert "| recall | inshop | left out: In-Shop: 1 of 2 images are missing" in text
    assert (
        "| retrieval | roxford5k | papers_medium_map |" in text and "| 32.1 |" in text
    )  # published for this recipe on this set
    assert "| backgrounds | bg_challenge | bg_gap |" in text and "| 7.5 |" in text
    for name in reports:
        assert Report.load(tmp_path / "out" / "reports" / f"{name}.json").numbers.keys() == reports[name].numbers.keys()
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["imagenet_classes.png", "imagenet_confusion.png", "imagenet_map.png", "imagenet_neighbors.png"]
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "out" / "tensorboard"))
    numbers = reports["baselines_imagenet"].numbers
    assert f"| knn | imagenet | whitened pixels, k = 18 | {numbers['whitened_pixels_top1_k18']:.2f} |" in text
    again = EVALUATIONS["knn"](tiny_encoder(), _knn_data(folder), feature="pooled", k=(10, 20))
    assert again.numbers == reports["knn_imagenet"].numbers  # cached features give the same numbers


def _knn_data(folder):
    return next(task for task in run_all.plan(folder) if task.evaluation == "knn").read()


def test_published_numbers_name_recipes_and_numbers_that_exist():
    from maskwise.recipe.reading import locate

    for recipe, numbers in PUBLISHED.items():
        assert locate(recipe)[0].is_file(), recipe
        assert {key.split(".")[0] for key in numbers} <= set(EVALUATIONS)
    assert published("attmask/20pct_high", "backgrounds", "in9", "bg_gap") == 13.9
    assert published("attmask/100pct_high", "retrieval", "rparis6k", "papers_hard_map") == 31.5
    assert published("attmask/100pct_high", "knn", "imagenet", "pooled_few_shot_20") == 59.1
    assert published(None, "knn", "imagenet", "top1") is None and published("unknown", "knn", "x", "top1") is None


def test_recipe_of_a_run(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps({"command": "maskwise train configs/attmask/20pct_high.yaml --out runs/x"})
    )
    assert run_folder.recipe_of(tmp_path) == "attmask/20pct_high"
    (tmp_path / "run.json").write_text(json.dumps({"command": "python my.py"}))
    assert run_folder.recipe_of(tmp_path) is None and run_folder.recipe_of(tmp_path / "none") is None


def test_report_keeps_seeds_and_epochs(tmp_path):
    report = Report(
        {"top1": float("nan")},
        {"k": (1, 2)},
        "0" * 64,
        {"seconds": np.float64(1.5)},
        seeds={"k-means": 3},
        epochs={"best": {"epoch": 4}},
    )
    loaded = Report.load(report.save(tmp_path / "r.json"))
    assert (
        loaded.seeds == {"k-means": 3}
        and loaded.epochs == {"best": {"epoch": 4}}
        and loaded.numbers == {"top1": None}
        and loaded.cost == {"seconds": 1.5}
    )


def test_sets_with_boxes_are_localized_and_discovered_each_year_of_voc_by_itself(tmp_path):
    root = tmp_path / "data"
    voc_on_disk(root)
    shutil.copytree(root / "VOCdevkit" / "VOC2007", root / "VOCdevkit" / "VOC2012")
    coco_on_disk(root / "coco")
    tasks = [task.name for task in run_all.plan(root)]
    expected = ["VOC2007", "VOC2012", "coco"]
    assert sorted(tasks) == sorted(f"{name}_{part}" for name in ("discovery", "mask_overlap") for part in expected)
    reports = run_all.run_all(tiny_encoder(), root, tmp_path / "out", recipe="simpool/vits16_dino", say=str)
    assert len(reports) == 6 and reports["discovery_VOC2012"].protocol["images"] == 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| discovery | VOC2007 | lost |" in table and "| 59.8 |" in table and "| 65 |" in table
    assert published("simpool/vits16_dino", "discovery", "coco", "dino_seg_faithful") == 43.4
    assert published("simpool/vits16_dino_cls", "localization", "cub", "max_box_acc_v2") == 82.7
    assert published("simpool/vits16_dino_cls", "discovery", "VOC2007", "dino_seg") is None

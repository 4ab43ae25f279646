"""Baselines of a run: measured once, before its first k-NN report, on the same images."""

import json

import pytest

import maskwise
from maskwise import build
from maskwise.build import baselines as module
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.distributed.world import World
from maskwise.engine import trainer
from maskwise.engine.run_log import RunLog
from maskwise.evaluation.features import extract
from maskwise.evaluation.knn import knn
from maskwise.evaluation.report import Report

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("data.count=40", "train.epochs=2", "evaluate.pictures_every=0", "evaluate.k=[1, 5]", "evaluate.limit_bank=30")


def recipe(*overrides):
    return maskwise.read_recipe("debug/tiny", *SMALL, *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines") / "run"
    assert maskwise.train(recipe(), out=folder, quiet=True)["status"] == "complete"
    return folder


def test_numbers_are_those_of_the_first_weights_and_of_pixels(run):
    report = Report.load(run / "reports" / "baselines.json")
    data = {"train": build.dataset(recipe()), "test": build.dataset(recipe(), "test")}
    data["train"] = subsample_evenly(data["train"], 30)
    first = knn(build.encoder(recipe()), data, k=(1, 5), pixels=32, whitened_pixels=32).numbers
    for k in (1, 5):
        for ours, theirs in (("untrained_pooled", "pooled"), ("pixels", "pixels"), ("whitened_pixels",) * 2):
            assert report.numbers[f"{ours}_top1_k{k}"] == first[f"{theirs}_top1_k{k}"]
    assert report.numbers["chance"] == 12.5 and report.protocol["whitened_pixels"]["dims"] == 3
    stored = [json.loads(path.read_text()) for path in sorted((run / "reports").glob("knn_step_*.json"))]
    assert [each["data_hash"] for each in stored] == [report.data_hash] * 2


def test_a_continued_run_does_not_measure_them_again(tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    step, measured = trainer.Trainer.step, []

    def stop_in_the_second_epoch(self, *arguments, **options):
        if self.step_index == 7:
            raise Interrupted
        return step(self, *arguments, **options)

    measure = module.knn_baselines.baselines
    monkeypatch.setattr(module.knn_baselines, "baselines", lambda *a, **o: measured.append(1) or measure(*a, **o))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.Trainer, "step", stop_in_the_second_epoch)
        maskwise.train(recipe(), out=tmp_path / "run", quiet=True)
    assert len(measured) == 1
    assert maskwise.train(recipe(), out=tmp_path / "run", quiet=True)["status"] == "complete"
    assert len(measured) == 1
    (tmp_path / "run" / "reports" / "baselines.json").write_text("{}")
    about = module.RunBaselines(recipe(), *images(), World(), log(tmp_path / "run"), None)
    assert not about.stored()


def images():
    return build.dataset(recipe()), build.dataset(recipe(), "test")


def log(folder):
    return RunLog(folder, 10, quiet=True)


def test_those_of_other_images_do_not_count(run):
    world = World()
    assert module.RunBaselines(recipe(), *images(), world, log(run), None).stored()
    assert not module.RunBaselines(recipe("evaluate.limit_bank=20"), *images(), world, log(run), None).stored()


def test_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "pixels", None)
    options = ("train.steps=2", "evaluate.baselines=false")
    assert maskwise.train(recipe(*options), out=tmp_path / "run", quiet=True)["status"] == "complete"
    assert [path.name for path in (tmp_path / "run" / "reports").glob("*.json")] == ["knn_step_00000002.json"]


def test_the_console_names_them_once(tmp_path, capsys):
    maskwise.train(recipe("train.steps=2"), out=tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "baselines" in line]
    assert len(lines) == 1 and lines[0].startswith("k-NN baselines (k = 1): untrained network ")
    assert "raw pixels" in lines[0] and "whitened pixels" in lines[0] and lines[0].endswith("chance 12.5")


def test_they_are_drawn_and_listed_on_the_card(run, tmp_path, monkeypatch):
    from maskwise.evaluation.suite import attention_sheets

    drawn = {}
    chart = attention_sheets.line_chart
    monkeypatch.setattr(
        attention_sheets, "line_chart", lambda series, title, **o: drawn.update({title: series}) or chart(series, title)
    )
    attention_sheets.curves(run / "metrics.jsonl")
    report = Report.load(run / "reports" / "baselines.json")
    knn_chart = drawn["k-NN accuracy of the teacher (%)"]
    assert knn_chart["raw pixels"] == [(5, report.numbers["pixels_top1_k1"]), (10, report.numbers["pixels_top1_k1"])]
    assert {"top-1", "untrained network", "whitened pixels"} <= set(knn_chart)

    maskwise.export(run, tmp_path / "out", say=None)
    text = (tmp_path / "out" / "README.md").read_text()
    last = json.loads((run / "reports" / "knn_step_00000010.json").read_text())["numbers"]
    trained = max(last["pooled_top1_k5"], last["patch_mean_top1_k5"])
    numbers = report.numbers
    untrained = max(numbers["untrained_pooled_top1_k5"], numbers["untrained_patch_mean_top1_k5"])
    cells = [trained, untrained, numbers["pixels_top1_k5"], numbers["whitened_pixels_top1_k5"]]
    row = " | ".join(f"{value:.1f}" for value in cells)
    assert f"| k = 5, 30 training, 40 test images | {row} |" in text
    header = text.partition("\n---\n")[0]
    assert "knn pooled_top1_k5" in header and "untrained" not in header and "whitened" not in header

"""The health corpus covers methods and alarms, its recipes can be read, and its faults are faults."""

from pathlib import Path

import pytest
import torch

from launch.reproduce import faulty_runs, health_corpus
from maskwise.data.datasets.shapes import Shapes
from maskwise.engine.collapse_alarms import ALARMS
from maskwise.functional.collapse import mask_agreement
from maskwise.recipe.reading import read_recipe


def test_the_healthy_runs_cover_methods_maskings_poolings_and_seeds():
    words = [dict(word.split("=") for word in overrides) for _, overrides in health_corpus.HEALTHY]
    assert len(words) >= 10
    for key, count in (("method.name", 2), ("masking.name", 3), ("pooling.name", 2), ("seed", 2)):
        assert len({word[key] for word in words}) == count


def test_every_alarm_has_a_fault_that_must_raise_it():
    expected = {kind for kinds, _, _ in health_corpus.UNHEALTHY.values() for kind in kinds}
    assert expected == {*ALARMS, "knn", "skipped"}


def test_the_committed_result_has_the_present_alarms():
    result = health_corpus.stored(Path(__file__).resolve().parents[2] / "docs" / "results" / "health.json")
    kinds = {kind for run in result["unhealthy"].values() for kind in (*run["alarms"], *run["expected"])}
    assert kinds <= {*ALARMS, "knn", "skipped"} and "uniform_targets" in kinds
    assert result["verdict"]["healthy_without_alarm"] == 12 and result["verdict"]["alarm_raised"] == 20


def test_a_fault_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(health_corpus, "SHORT", 1)
    result = health_corpus.measure("NaN losses, at half", say=lambda line: None)
    [run] = result["unhealthy"].values()
    assert run["steps"] == 10 and run["expected"] == ("skipped",) and result["thresholds"]["WINDOW"] == 10


@pytest.mark.parametrize("title", health_corpus.UNHEALTHY)
def test_recipes_are_valid(title):
    _, half, overrides = health_corpus.UNHEALTHY[title]
    for strength in (1.0, 0.5):
        read_recipe(health_corpus.RECIPE, "train.epochs=3", *overrides(strength))
    assert half and overrides(1.0) != overrides(0.5)


def test_faults_of_strength_zero_are_healthy():
    plain = Shapes(8, 40)
    assert all(
        torch.equal(faulty_runs.Blank(8, 40, 0.0).image(i), plain.image(i))
        and torch.equal(faulty_runs.Gray(8, 40, 0.0).image(i), plain.image(i))
        for i in range(8)
    )


def test_faults_at_full_strength():
    blank, gray = faulty_runs.Blank(40, 40), faulty_runs.Gray(40, 40)
    assert all(torch.equal(blank.image(i), blank.image(0)) for i in range(8))
    assert (
        all(len(gray.image(i).unique()) == 1 for i in range(8))
        and len({int(gray.image(i)[0, 0, 0]) for i in range(8)}) == 8
    )
    half = faulty_runs.Blank(40, 40, 0.5)
    assert 15 <= sum(torch.equal(half.image(i), blank.image(0)) for i in range(40)) <= 25
    masks = [
        faulty_runs.SameMask(fault=fault, prob=1.0)(None, (4, 4), step=0, sample_ids=torch.arange(20))
        for fault in (0.0, 0.5, 1.0)
    ]
    agreements = [float(mask_agreement(mask)) for mask in masks]
    assert abs(agreements[0]) < 0.1 < 0.3 < agreements[1] < 0.6 and agreements[2] == 1
    assert {int(count) for mask in masks for count in mask.sum(dim=1)} == {6}

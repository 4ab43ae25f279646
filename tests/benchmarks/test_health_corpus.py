"""The corpus covers what it says, its recipes can be read, and its faults are faults."""

import pytest
import torch

from benchmarks import health_corpus, sick
from maskwise.data.shapes import Shapes
from maskwise.engine.health import SIGNS
from maskwise.functional.vitals import mask_agreement
from maskwise.recipe import read_recipe


def test_the_healthy_runs_cover_methods_maskings_poolings_and_seeds():
    words = [dict(word.split("=") for word in overrides) for _, overrides in health_corpus.HEALTHY]
    assert len(words) >= 10
    for key, count in (("method.name", 2), ("masking.name", 3), ("pooling.name", 2), ("seed", 2)):
        assert len({word[key] for word in words}) == count


def test_every_alarm_has_a_fault_that_must_raise_it():
    expected = {kind for kinds, _, _ in health_corpus.SICK.values() for kind in kinds}
    assert expected == {*SIGNS, "knn", "skipped"}


@pytest.mark.parametrize("title", health_corpus.SICK)
def test_the_recipes_can_be_read(title):
    _, half, overrides = health_corpus.SICK[title]
    for strength in (1.0, 0.5):
        read_recipe("pretrain/quickstart_shapes", *health_corpus.TINY, "train.epochs=3", *overrides(strength))
    assert half and overrides(1.0) != overrides(0.5)


def test_faults_of_no_strength_are_none():
    plain = Shapes(8, 40)
    assert all(torch.equal(sick.Blank(8, 40, 0.0).image(i), plain.image(i)) and torch.equal(sick.Grey(8, 40, 0.0).image(i), plain.image(i)) for i in range(8))


def test_faults_at_full_strength():
    blank, grey = sick.Blank(40, 40), sick.Grey(40, 40)
    assert all(torch.equal(blank.image(i), blank.image(0)) for i in range(8))
    assert all(len(grey.image(i).unique()) == 1 for i in range(8)) and len({int(grey.image(i)[0, 0, 0]) for i in range(8)}) == 8
    half = sick.Blank(40, 40, 0.5)
    assert 15 <= sum(torch.equal(half.image(i), blank.image(0)) for i in range(40)) <= 25
    masks = [sick.SameMask(fault=fault, prob=1.0)(None, (4, 4), step=0, sample_ids=torch.arange(20)) for fault in (0.0, 0.5, 1.0)]
    agreements = [float(mask_agreement(mask)) for mask in masks]
    assert abs(agreements[0]) < 0.1 < 0.3 < agreements[1] < 0.6 and agreements[2] == 1
    assert {int(count) for mask in masks for count in mask.sum(dim=1)} == {6}

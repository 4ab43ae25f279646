"""Advice: each rule at the published settings, and where it should speak."""

import pytest

from maskwise.doctor.advice import advice, suggested_momentum
from maskwise.recipe import read_recipe


def lines(name, images, *overrides):
    return advice(read_recipe(name, *overrides), images)


def test_published_recipes_are_left_alone():
    for name in ("pretrain/attmask_hint_vits16", "pretrain/ibot_vits16", "pretrain/dino_vits16"):
        said = lines(name, 1_281_167)
        assert len(said) == 3 and "fits" in said[0] and "lies where" in said[1] and "is a published choice" in said[2], said


@pytest.mark.parametrize(
    "batch, steps, expected", [(256, 533_800, 0.996), (64, 200_000, 0.9995), (240, 5_000, 0.996), (240, 4_000, 0.99), (32, 1_000, 0.98), (32, 400, 0.95), (32, 50, 0.9)]
)
def test_the_teachers_memory_is_a_twentieth_of_the_run(batch, steps, expected):
    assert suggested_momentum(batch, steps) == expected
    assert 20 / (1 - expected) <= steps or expected == 0.9


@pytest.mark.parametrize(
    "overrides, images, words",
    [
        (["train.epochs=30"], 2_400, "teacher.momentum 0.996 remembers 250 steps and the run has 300: give 0.9"),
        (["train.batch_size=64", "optimizer.min_lr=0"], 1_281_167, "the authors of DINO advise .9995 for small batches"),
        (["optimizer.lr=5e-3"], 1_281_167, "is above every published one"),
        (["optimizer.lr=2e-5"], 1_281_167, "is far below the published ones"),
        (["teacher.temp=0.1"], 1_281_167, "above .07, the highest that is published"),
        (["train.epochs=20", "teacher.warmup_temp_epochs=2"], 1_281_167, "for shorter runs keep .04"),
        ([], 2_000, "8 steps an epoch: schedules in epochs move in leaps; a smaller train.batch_size (such as 40)"),
        ([], 5_000, "head.prototypes 8192 for 5000 images: more kinds than images; 512 is enough"),
        (["train.epochs=30", "optimizer.freeze_last_layer=10"], 1_281_167, "give 0 in a run this short"),
        (["head.norm_last_layer=false"], 5_000, "norm_last_layer=true is the steadier choice"),
        (["optimizer.name=lars"], 1_281_167, "for LARS 4.8"),
    ],
)
def test_what_is_unusual_is_said(overrides, images, words):
    said = lines("pretrain/attmask_hint_vits16", images, *overrides)
    assert any(words in line for line in said), said

"""Advice on recipes: the published settings, and each setting that deserves a warning."""

import pytest

from maskwise.doctor.advice import advice, suggested_momentum
from maskwise.recipe.reading import read_recipe


def lines(name, images, *overrides):
    return advice(read_recipe(name, *overrides), images)


def test_published_recipes_get_no_warnings():
    for name in ("pretrain/attmask_hint_vits16", "pretrain/ibot_vits16", "pretrain/dino_vits16"):
        text = lines(name, 1_281_167)
        assert len(text) == 3, text
        assert "fits" in text[0] and "is in or near the published range" in text[1], text
        assert "is a published choice" in text[2], text


@pytest.mark.parametrize(
    "batch, steps, expected",
    [
        (256, 533_800, 0.996),
        (64, 200_000, 0.9995),
        (240, 5_000, 0.996),
        (240, 4_000, 0.99),
        (32, 1_000, 0.98),
        (32, 400, 0.95),
        (32, 50, 0.9),
    ],
)
def test_suggested_momentum_averages_over_a_twentieth_of_the_run(batch, steps, expected):
    assert suggested_momentum(batch, steps) == expected
    assert 20 / (1 - expected) <= steps or expected == 0.9


@pytest.mark.parametrize(
    "overrides, images, words",
    [
        (["train.epochs=30"], 2_400, "teacher.momentum 0.996 averages over 250 steps, and the run has 300: use 0.9"),
        (
            ["train.batch_size=64", "optimizer.min_lr=0"],
            1_281_167,
            "the authors of DINO advise .9995 for small batches",
        ),
        (["optimizer.lr=5e-3"], 1_281_167, "is above the published range"),
        (
            ["optimizer.lr=5e-4", "train.batch_size=512"],
            1_281_167,
            "peak learning rate 0.001 (optimizer.lr 0.0005 x 512 / 256)",
        ),
        (["optimizer.lr=2e-5"], 1_281_167, "is far below the published range"),
        (["teacher.temp=0.1"], 1_281_167, "above .07, the highest published value"),
        (["train.epochs=20", "teacher.warmup_temp_epochs=2"], 1_281_167, "keep .04 in shorter runs"),
        (
            [],
            2_000,
            "8 steps per epoch: schedules given in epochs change in large jumps; "
            "a smaller train.batch_size (such as 40)",
        ),
        ([], 5_000, "head.prototypes 8192 is more than the 5000 images: 512 is enough"),
        (["train.epochs=30", "optimizer.freeze_last_layer=10"], 1_281_167, "use 0 in a run this short"),
        (["head.norm_last_layer=false"], 5_000, "norm_last_layer=true is more stable on small data"),
        (["optimizer.name=lars"], 1_281_167, "for LARS 4.8"),
    ],
)
def test_unusual_settings_get_a_warning(overrides, images, words):
    text = lines("pretrain/attmask_hint_vits16", images, *overrides)
    assert any(words in line for line in text), text

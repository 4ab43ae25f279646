"""The section speed and train.accumulate, from the recipe to the objects."""

import pytest

from maskwise import build
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.recipe.consistency import fitted
from maskwise.recipe.reading import read_recipe


def make_trainer(*overrides, **options):
    return build.trainer(read_recipe("debug/tiny", *overrides), World(), images=64, **options)


def test_cpu_defaults_of_speed_options():
    assert make_trainer().method.student.encoder.backbone.checkpointing == "elementwise"
    trainer = make_trainer("speed.checkpointing=blocks", "train.accumulate=2")
    assert trainer.method.student.encoder.backbone.checkpointing == "blocks" and trainer.accumulate == 2
    assert not trainer.method.student.encoder.backbone.compiled


def test_rows_are_rounded_where_new_shapes_cost():
    assert make_trainer().method.pad_multiple == 1
    assert make_trainer(precision="bf16").method.pad_multiple == 2 * 8 * 16 // 16
    assert make_trainer("train.accumulate=4", precision="bf16").method.pad_multiple == 2 * 8 * 16 // 16 // 4
    assert make_trainer("method.pad_multiple=5", precision="bf16").method.pad_multiple == 5


def test_compile_without_a_compiler_is_a_one_line_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="C\\+\\+ compiler") as caught:
        make_trainer("speed.compile=true")
    assert "\n" not in str(caught.value)


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(UserError, match="train.accumulate=3"):
        fitted(read_recipe("debug/tiny", "train.accumulate=3"), 64, 1)
    with pytest.raises(UserError, match="2 ranks"):
        fitted(read_recipe("debug/tiny", "train.accumulate=8"), 64, 2)
    fitted(read_recipe("debug/tiny", "train.accumulate=4"), 64, 2)


def test_recipe_hash_excludes_speed_but_includes_accumulate():
    recipe = read_recipe("debug/tiny")
    assert read_recipe("debug/tiny", "speed.checkpointing=blocks", "speed.compile=true").hash() == recipe.hash()
    assert read_recipe("debug/tiny", "train.accumulate=2").hash() != recipe.hash()

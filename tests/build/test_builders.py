"""The choice between the two kinds of training, and the values that supervised training does not read."""

import pytest

from maskwise import build
from maskwise.methods import METHODS
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.schema import (
    SELF_SUPERVISED_KEYS,
    SUPERVISED_CONSTANTS,
    SUPERVISED_DEFAULTS,
    SUPERVISED_KEYS,
    is_among,
    learns_labels,
)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_declares_its_kind(name):
    assert METHODS[name].learns_labels in build.BUILDERS
    assert learns_labels(name) == (name == "supervised")


@pytest.mark.parametrize("name, kind", [("debug/tiny", False), ("debug/tiny_supervised", True)])
def test_a_recipe_has_the_builder_of_its_method(name, kind):
    assert build.builder_for(read_recipe(name)) is build.BUILDERS[kind]


def test_keys_of_one_kind_are_not_read_by_the_other():
    self_supervised, supervised = (read_recipe(f"debug/{name}").values for name in ("tiny", "tiny_supervised"))
    assert not [key for key in supervised if is_among(key, SELF_SUPERVISED_KEYS)]
    assert not [key for key in self_supervised if is_among(key, SUPERVISED_KEYS)]
    assert SUPERVISED_DEFAULTS.keys() <= supervised.keys()


def test_constants_stand_for_keys_that_supervised_training_does_not_read():
    recipe = read_recipe("debug/tiny_supervised")
    for key, value in SUPERVISED_CONSTANTS.items():
        section, _, name = key.partition(".")
        assert is_among(key, SELF_SUPERVISED_KEYS) and key not in recipe.values
        assert getattr(getattr(recipe, section), name) == value


def test_patch_rows_are_padded_where_shapes_cost():
    recipe = read_recipe("debug/tiny", "train.batch_size=64")
    trainers = {precision: build.trainer(recipe, images=64, precision=precision) for precision in ("fp32", "bf16")}
    assert trainers["fp32"].method.pad_multiple == 1
    height, width = trainers["bf16"].method.teacher.encoder.backbone.grid_for((recipe.crops.global_size,) * 2)
    assert trainers["bf16"].method.pad_multiple == 2 * 64 * height * width // 16
    given = build.trainer(read_recipe("debug/tiny", "method.pad_multiple=7"), images=64, precision="bf16")
    assert given.method.pad_multiple == 7

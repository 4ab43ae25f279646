"""Rows of all recipe keys: complete, each with its meaning, and with the values that the code declares."""

import pytest

from maskwise.recipe.key_rows import key_rows
from maskwise.recipe.meanings import MEANINGS
from maskwise.recipe.reading import file_layers, locate, read_recipe, shipped
from maskwise.recipe.schema import constructor_keys, tables

ROWS = key_rows()
KEYS = {row.key for row in ROWS}


@pytest.mark.parametrize("name", shipped())
def test_every_key_of_a_shipped_recipe_has_a_row(name):
    layers, mistakes = file_layers(*locate(name))
    assert not mistakes and {key for layer in layers for key in layer} <= KEYS


@pytest.mark.parametrize("name", ["debug/tiny", "debug/tiny_supervised"])
def test_every_key_of_a_resolved_recipe_has_its_row(name):
    """Keys at their default have a row with that default."""
    recipe = read_recipe(name, try_model=False)
    assert set(recipe.values) <= KEYS
    from maskwise.recipe.yaml_text import write

    shown = {(row.key, row.default) for row in ROWS}
    defaults = {key: write(value) for key, value in recipe.values.items() if recipe.origin(key) == "default"}
    assert len(defaults) > 30 and set(defaults.items()) <= shown


def test_every_argument_of_every_table_has_a_row():
    arguments = {
        f"{section}.{key}"
        for section, table in tables().items()
        for cls in table.values()
        for key in constructor_keys(section, cls)
    }
    assert len(arguments) > 90 and arguments <= KEYS


def test_every_row_has_a_meaning_and_every_meaning_a_row():
    assert [row.key for row in ROWS if not row.meaning] == []
    texts = {f"{section}.{name}".lstrip(".") for section, names in MEANINGS.items() for name in names}
    assert texts == KEYS


@pytest.mark.parametrize(
    "key, rows",
    [
        ("seed", [("", "a whole number", "0", "at least 0", "recipe/schema.py")]),
        ("data.set", [("torchvision", "text", "required", "", "data/datasets/torchvision_sets.py")]),
        (
            "data.split",
            [
                ("folder, list, tar, torchvision, huggingface", "text or null", "null", "", "data/datasets/"),
                ("shapes", "text", "train", "", "data/datasets/shapes.py"),
            ],
        ),
        (
            "optimizer.min_lr",
            [
                ("method dino, ibot, mst, distill", "a number", "1e-06", "at least 0", "recipe/sections.py"),
                ("method supervised", "a number", "0.0", "at least 0", "recipe/sections.py"),
            ],
        ),
        ("teacher.patch_temp", [("method ibot", "a number", "0.07", "above 0", "recipe/sections.py")]),
        ("optimizer.momentum", [("sgd, lars", "a number", "0.9", "from 0 to below 1", "engine/optim.py")]),
        (
            "pooling.gamma",
            [
                ("simpool", "a number or null", "1.25", "above 0", "nn/pooling/simpool.py"),
                ("gem", "a number", "2.0", "above 0", "nn/pooling/simple.py"),
            ],
        ),
        (
            "pooling.similarity",
            [("simpool", "dot or euclidean or cosine", "dot", "", "nn/pooling/simpool_ablations.py")],
        ),
        (
            "crops.global_scale",
            [
                (
                    "method dino, ibot, mst, distill",
                    "a list of 2 numbers",
                    "[0.25, 1.0]",
                    "above 0 and at most 1",
                    "data/options.py",
                )
            ],
        ),
        ("method.lambda2", [("ibot", "a number", "1.0", "at least 0", "methods/ibot.py")]),
        ("backbone.drop_path", [("", "a number", "0.1", "from 0 to below 1", "nn/backbones/factory.py")]),
        ("backbone.small_stem", [("ResNet", "true or false", "timm's", "", "nn/backbones/families/resnet.py")]),
        (
            "backbone.depths",
            [("ConvNeXt, SwinTransformer, SwinTransformerV2", "a list of whole numbers", "timm's", "", "timm")],
        ),
    ],
)
def test_a_row_states_readers_type_default_bounds_and_source(key, rows):
    assert [(row.readers, row.type, row.default, row.bounds, row.source) for row in ROWS if row.key == key] == rows

"""Shipped recipes in miniature: a table of sizes; all other values are those of the recipe."""

import functools

from maskwise.recipe.reading import read_recipe, shipped
from maskwise.recipe.recipe import Recipe

COMMON = (
    "head.prototypes=64",
    "head.hidden=64",
    "head.bottleneck=16",
    "train.batch_size=8",
    "evaluate.knn_every=0",
    "evaluate.pictures_every=0",
    "speed.workers=0",
)
SIZES = (
    "crops.global_size=32",
    "crops.local_size=16",
    "backbone.image_size=32",
    "backbone.patch_size=8",
    "backbone.embed_dim=48",
    "backbone.depth=2",
    "backbone.num_heads=3",
    *COMMON,
)
CHOSEN = (  # of the ResNet that `train --data` chooses
    *("crops.global_size=32", "crops.local_size=16", "backbone.image_size=32", "backbone.channels=[8, 8, 8, 16]"),
    *COMMON,
)
LARGER = ("crops.global_size=96", "crops.local_size=32", "backbone.image_size=96", *COMMON)
MAP_SIZES = {
    "resnet": (*LARGER, "backbone.layers=[1, 1, 1, 1]", "backbone.channels=[8, 8, 8, 16]"),
    "convnext": (*LARGER, "backbone.depths=[1, 1, 1, 1]", "backbone.dims=[8, 16, 16, 24]"),
    "resmlp": ("crops.global_size=32", "backbone.image_size=32", "backbone.name=resmlp_12_224", *COMMON),
    "pit": (*LARGER, "backbone.base_dims=[8, 8, 8]", "backbone.depth=[1, 2, 1]", "backbone.heads=[1, 2, 4]"),
    "mobilenetv": ("crops.global_size=32", "backbone.image_size=64", "backbone.name=mobilenetv2_035", *COMMON),
    "maxvit": ("crops.global_size=64", "backbone.image_size=64", "backbone.name=test_maxvit", *COMMON),
    "swin": (*LARGER, "backbone.depths=[2, 2, 2, 2]", "backbone.embed_dim=8", "backbone.num_heads=[1, 2, 2, 4]"),
}
CLASSIFIER_SIZES = {
    "map": ("classifier.dim=32", "classifier.embed=32", "classifier.heads=2", "classifier.gram_groups=4")
}
IMAGES = ("data=shapes", "data.count=16", "data.size=40")
WITHOUT_START = ("method.start_from=null", "method.head_warmup_epochs=null")
RECIPES = shipped()


@functools.lru_cache
def resolved(name: str) -> Recipe:
    """Return a shipped recipe without building its model (that of the miniature is built)."""
    return read_recipe(name, try_model=False)


def sizes(name: str) -> tuple[str, ...]:
    """Return the overrides that make a recipe's model small."""
    overrides = MAP_SIZES.get(
        resolved(name).backbone.name.partition("_")[0].removeprefix("se").rstrip("0123456789"), SIZES
    )
    if resolved(name).values.get("backbone.stem") == "conv":  # the strides of the stem give the patch
        overrides = tuple(word for word in overrides if not word.startswith("backbone.patch_size"))
    if resolved(name).method.name == "distill":
        return tuple(word for word in overrides if not word.startswith("head."))
    if not resolved(name).learns_labels:
        return overrides
    supervised = [
        word.replace("crops.global_size", "augment.size")
        for word in overrides
        if not word.startswith(("crops.local", "head.", "evaluate."))
    ]
    return (
        *supervised,
        *CLASSIFIER_SIZES.get(resolved(name).classifier.name, ()),
        "evaluate.top1_every=0",
        "evaluate.knn_every=0",
    )


def miniature(name: str, *more: str) -> Recipe:
    """Return a shipped recipe with small sizes; recipes that continue a model start from random weights."""
    start = WITHOUT_START if name.startswith("continue/") else ()
    start = ("method.model=support.tiny_teacher:TinyTeacher",) if name.startswith("distill/") else start
    optimizer = resolved(name).optimizer
    if optimizer.min_lr > optimizer.peak(8):  # the peak follows the batch, the last rate does not
        start = (*start, "optimizer.min_lr=0")
    return read_recipe(name, *IMAGES, *sizes(name), *start, *more)

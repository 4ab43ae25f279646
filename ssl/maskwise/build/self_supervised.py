"""Building for methods without labels: multi-crop views, projection head, masking."""

from __future__ import annotations

from functools import partial

from torch import nn

from maskwise.build import distillation
from maskwise.data.augmentation import color
from maskwise.data.multicrop import MultiCrop
from maskwise.distributed.world import World
from maskwise.functional import keyed_random
from maskwise.imaging.resize import pair
from maskwise.nn import Encoder, ProjectionHead
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import named
from maskwise.recipe.signatures import parameters_of

PADDED_SIZES = 16  # how many different numbers of masked patch rows a run has at most, where rows are padded


def views(recipe: Recipe) -> MultiCrop:
    """Return the multi-crop of a recipe."""
    return MultiCrop(recipe.crops, seed=recipe.seed)


def inputs(recipe: Recipe, trainer):
    """Return the callable batch -> (global crops, local crops or None), normalized floats on the batch's device."""
    return partial(float_crops, trainer.method.teacher.encoder)


def float_crops(encoder: Encoder, batch):
    """Apply color augmentation to a batch's crops and normalize them, on their device."""
    parts = ((batch.global_crops, batch.params.global_), (batch.local_crops, batch.params.local_))
    return tuple(
        color.augment(crops, params, encoder.mean, encoder.std) if len(crops) else None for crops, params in parts
    )


def classes(recipe: Recipe, data) -> None:
    """Return None: these methods read no labels."""


def method(recipe: Recipe, encoder: Encoder, world: World, classes: None, precision: str) -> nn.Module:
    """Return the method on an encoder, with projection head and masking; a function of the recipe's seed."""
    if "source" in parameters_of(named("method", recipe.method.name))[0]:
        return distillation.method(recipe, encoder, world)
    with keyed_random.seed_scope(recipe.seed + 1):
        head = ProjectionHead(encoder.dim, **recipe.head.keywords())
    masking = named("masking", recipe.masking.name)(seed=recipe.seed, **recipe.masking.keywords())
    cls, teacher = named("method", recipe.method.name), recipe.teacher
    accepted = parameters_of(cls)[0]
    options = recipe.method.keywords() | {
        "teacher_temp": teacher.temp,
        "warmup_teacher_temp": teacher.warmup_temp,
        "warmup_teacher_temp_epochs": teacher.warmup_temp_epochs,
        "all_sum": world.all_sum,
        "world_size": world.size,
        "rank": world.rank,
        "seed": recipe.seed,
        "masking": masking,
    }
    if "patch_temp" in accepted:  # iBOT, and methods derived from it
        options |= {"patch_temp": teacher.patch_temp, "warmup_patch_temp": teacher.warmup_patch_temp}
    if "pad_multiple" in accepted and options.get("pad_multiple", 1) == 1:
        options["pad_multiple"] = pad_multiple(recipe, world, precision, encoder)
    return cls(encoder, head, **options)


def pad_multiple(recipe: Recipe, world: World, precision: str, encoder: Encoder) -> int:
    """Return the multiple to which masked patch rows are padded, 1 where a new number of rows costs nothing.

    GPU kernels, bf16 and compiled code are chosen per shape: with padding there are at most PADDED_SIZES shapes.
    """
    if world.device.type == "cpu" and precision == "fp32" and not recipe.speed.compile:
        return 1
    height, width = encoder.backbone.grid_for(pair(recipe.crops.global_size))
    crops = 2 * recipe.train.batch_size // world.size // recipe.train.accumulate
    return max(1, crops * height * width // PADDED_SIZES)


def evaluations(recipe: Recipe, data, test, world: World) -> dict:
    """Return {}: these methods have no evaluation of their own."""
    return {}

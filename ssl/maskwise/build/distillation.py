"""Building for distillation: the frozen teacher, and the method on a student."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export.model_location import TIMM, locate
from maskwise.functional import keyed_random
from maskwise.imaging.resize import pair
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import named

KEY = "method.model"
SOURCE = 3  # seed of a teacher of one's own, after those of encoder, head and projections


def method(recipe: Recipe, encoder: Encoder, world: World) -> nn.Module:
    """Return the method on an encoder, with the frozen teacher and masking; a function of the recipe's seed."""
    if recipe.speed.shard != "none" and world.size > 1:
        raise UserError(f"speed.shard={recipe.speed.shard} does not support {recipe.method.name}: leave it out")
    options = recipe.method.keywords()
    source = frozen_teacher(options["model"], recipe.seed)
    size = options.get("teacher_size") or recipe.crops.global_size
    try:
        source.backbone.check_size(pair(size))
    except UserError as error:
        raise UserError(f"{KEY} {options['model']}: {error}; method.teacher_size resizes its crops") from None
    masking = named("masking", recipe.masking.name)(seed=recipe.seed, **recipe.masking.keywords())
    average = recipe.teacher.momentum is not None
    cls = named("method", recipe.method.name)
    return cls(encoder, source, masking, average=average, seed=recipe.seed, **options)


def frozen_teacher(name: str, seed: int) -> Encoder:
    """Return the encoder of a name: anything that `load` reads, a timm name, or your own network as `module:Class`.

    A network of your own loads its weights itself and is pooled by the mean. Raises UserError for a model that is
    missing or cannot be read.
    """
    if ":" in name and not name.startswith((TIMM, "hub:", "hf-hub:")) and not Path(name).expanduser().exists():
        with keyed_random.seed_scope(seed + SOURCE):
            backbone = Backbone(name)
            return Encoder(backbone, POOLINGS["gap"](backbone.dim), norm="before")
    path, timm_name = locate(name, KEY)
    return load.load(path if timm_name is None else f"{TIMM}{timm_name}")

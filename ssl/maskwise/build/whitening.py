"""Learning of the whitening filters of a run: one pass over training images before the first step."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from maskwise.data.reader import Reader
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import directories
from maskwise.functional import keyed_random
from maskwise.functional.whitening.patches import PatchMoments, whitening_filters
from maskwise.nn.backbones.families.whitening import Whitening
from maskwise.recipe.recipe import Recipe

MAX_IMAGES, MAX_PATCHES = 4096, 1 << 22


def learn_whitening(method: nn.Module, data, recipe: Recipe, folder: Path, world: World) -> list[str]:
    """Set the whitening filters of student and teacher from training images; return a line about it, if there are any.

    A run with a checkpoint in `folder`, or one that continues a model, has its filters. The images are the first of the
    run's own order, with the encoder's evaluation transform. Every rank computes the same; rank 0's filters are copied
    to all. Raises UserError where no images can be read.
    """
    layers = [layer for layer in method.modules() if isinstance(layer, Whitening)]
    if not layers or recipe.method.start_from is not None or directories(folder / "checkpoints"):
        return []
    encoder, (kernel, _) = method.teacher.encoder, layers[0].kernel_size
    height, width = encoder.image_size
    count = min(len(data), MAX_IMAGES, -(-MAX_PATCHES // (height * width)))
    moments, read = PatchMoments(layers[0].in_channels, kernel), Reader(data)
    for index in keyed_random.order(recipe.seed, 0, len(data))[:count].tolist():
        moments.add(encoder.transform(read(0, index))[None])
    filters = whitening_filters(moments.covariance())
    for layer in layers:
        layer.set_filters(filters)
        if world.size > 1:
            world.broadcast_parameters(layer)
    return [f"whitening of {kernel} x {kernel} patches learned from {count} images"]

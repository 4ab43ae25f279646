"""Networks with random weights, for baselines."""

from __future__ import annotations

from pathlib import Path

from maskwise.build.networks import encoder
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.recipe.reading import read_recipe


def untrained_network(name: str, image_size: int, seed: int) -> Encoder:
    """Return a timm backbone with random weights and its class token or mean patch as the vector."""
    with keyed_random.seed_scope(seed):
        backbone = Backbone(name, image_size=image_size)
        pooling = POOLINGS["cls" if backbone.has_class_token else "gap"](backbone.dim)
    return Encoder(backbone, pooling).eval()


def untrained_of(model) -> Encoder | None:
    """Return the network of a run, or of an export of one, with its initial weights; None without its recipe."""
    if not isinstance(model, (str, Path)) or not (Path(model).expanduser() / "recipe.yaml").is_file():
        return None
    try:
        return encoder(read_recipe(Path(model).expanduser(), try_model=False))
    except UserError:  # a recipe of other code, or a model to start from that is gone
        return None

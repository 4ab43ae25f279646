"""Models given by path or as objects, as encoders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from maskwise.errors import UserError
from maskwise.evaluation.features.timm_model import TimmModel, is_timm_model
from maskwise.evaluation.features.views import RawPixels
from maskwise.evaluation.features.whitened_pixels import WhitenedPixels
from maskwise.evaluation.knn import PIXEL_SIZE
from maskwise.export import load

PIXEL_MODELS = {"pixels": RawPixels, "whitened_pixels": WhitenedPixels}
MODEL_OPTIONS = ("weights", "layout", *load.OVERRIDES)  # of maskwise.load


def opened_model(model, options: Mapping):
    """Return a model as an encoder: a path loaded with the `options` of maskwise.load, a timm model in its form.

    Raises UserError for anything else, and for options of a model that is not loaded here.
    """
    if isinstance(model, (str, Path)):
        return load.load(os.path.expanduser(model), **options)
    if options:
        raise UserError(f"{next(iter(options))} is an option of maskwise.load; give it there, or give the model's path")
    if is_timm_model(model):
        return TimmModel(model)
    if not isinstance(model, torch.nn.Module) or not all(hasattr(model, name) for name in ("mean", "std", "transform")):
        kind = f"{type(model).__module__}.{type(model).__qualname__}".removeprefix("builtins.")
        raise UserError(
            f"{kind} is not a model that can be evaluated; give the path of a run or weights file, an encoder of "
            "maskwise.load, a timm model, or a module with mean, std and transform that returns .pooled and .patches"
        )
    return model


def pixel_model(name: str, options: Mapping):
    """Return raw or whitened pixels as an encoder; image_size: their side, by default 32. Raises UserError."""
    wrong = sorted(set(options) - {"image_size"})
    size = options.get("image_size", PIXEL_SIZE)
    if wrong or not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{name} takes image_size, a number of pixels, and none of the other options of a model")
    return PIXEL_MODELS[name](size)


def model_title(model) -> str:
    """Return the name of a model given by path, else its class."""
    return Path(model).name if isinstance(model, (str, os.PathLike)) else type(model).__name__

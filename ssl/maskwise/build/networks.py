"""Encoder, initial model and method of a recipe."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from maskwise.build.builders import builder_for
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import directories
from maskwise.errors import UserError
from maskwise.export.initial_model import InitialModel
from maskwise.functional import keyed_random
from maskwise.nn import Backbone, BackboneBase, Encoder
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import named


def encoder(recipe: Recipe, start: InitialModel | None = None) -> Encoder:
    """Return the encoder before training; its weights are a function of the recipe's seed.

    Input statistics and the size of the position table are those of `start`, where there is one.
    """
    options = recipe.backbone.keywords()
    given_size = options.pop("image_size", None)
    image_size = start.image_size(given_size) if start else given_size or recipe.image_size
    pooling_cls, pooling_options = named("pooling", recipe.pooling.name), recipe.pooling.keywords()
    if options.get("class_token") is None and "cls_attention" not in pooling_cls.needs:
        options["class_token"] = False  # no part reads it (SimPool, appendix C.5)
    with keyed_random.seed_scope(recipe.seed):
        backbone = Backbone(
            recipe.backbone.name,
            image_size=image_size,
            mask_token=recipe.masking.name != "none",
            mean=recipe.data.mean,
            std=recipe.data.std,
            **options,
        )
        if recipe.pooling.name == "simpool" and pooling_options["weight_init"] is None and backbone.kind == "ResNet":
            pooling_options["weight_init"] = "uniform"  # SimPool's ResNet code keeps torch's init of linear layers
        pooling = pooling_cls(backbone.dim, **pooling_options)
        model = Encoder(backbone, pooling, norm=recipe.pooling.norm, crop_pct=recipe.evaluate.crop_pct)
    return start.adopt_input_stats(model) if start else model


def initial_model(recipe: Recipe, folder: Path | None = None, record: dict | None = None) -> InitialModel | None:
    """Return the model that a recipe continues from, None where it starts from random weights.

    `record` is run.json of the run in `folder`; a run with a checkpoint no longer needs the model's file.
    Raises UserError for a model that cannot be read, and for another one than the run was started from.
    """
    if recipe.method.start_from is None:
        return None
    known = (record or {}).get("start")
    if known and folder and directories(folder / "checkpoints"):
        return InitialModel.from_record(known)
    gamma = recipe.pooling.keywords().get("gamma", 1.25)
    start = InitialModel.open(recipe.method.start_from, backbone=recipe.backbone.name, gamma=gamma)
    if known and known["sha256"] != start.digest:
        raise UserError(
            f"method.start_from {start.name} has changed since {folder} began: give another --out, or bring the old "
            "one back"
        )
    return start


def method(
    recipe: Recipe, world: World, precision: str, start: InitialModel | None = None, classes: int | None = None
) -> nn.Module:
    """Return the recipe's method, with the weights of `start` where there is one.

    `classes` is the number of classes of a supervised method.
    """
    student = encoder(recipe, start)
    apply_speed_options(student.backbone, recipe, world.device)
    model = builder_for(recipe).method(recipe, student, world, classes, precision)
    if start and start.source:
        start.load_into(model, recipe.method.start_head)
    return model


def apply_speed_options(backbone: BackboneBase, recipe: Recipe, device: torch.device) -> None:
    """Apply section speed to a backbone; `checkpointing: auto` leaves families without support alone."""
    speed = recipe.speed
    if speed.compile and not can_compile(device):
        needed = "a C++ compiler (g++, or what CXX names)" if device.type == "cpu" else "triton"
        raise UserError(
            f"speed.compile=true needs {needed}, which this machine lacks: install it, or give speed.compile=false"
        )
    checkpointing = speed.checkpointing
    if checkpointing == "auto":  # a compiler decides about elementwise recomputation itself
        elementwise = backbone.supports_execution_options and device.type == "cpu" and not speed.compile
        checkpointing = "elementwise" if elementwise else "none"
    backbone.set_execution(checkpointing=checkpointing, compiled=speed.compile)


def can_compile(device: torch.device) -> bool:
    """Return whether the compiler behind torch.compile is installed."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return importlib.util.find_spec("triton") is not None

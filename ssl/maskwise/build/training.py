"""The trainer of a recipe: method, optimizer, schedules, precision."""

from __future__ import annotations

from functools import partial

import torch

from maskwise.build.builders import builder_for
from maskwise.build.inputs import dataset
from maskwise.build.networks import initial_model, method
from maskwise.data import loader
from maskwise.distributed.world import World
from maskwise.engine.optim import check_groups, make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.errors import UserError
from maskwise.export.initial_model import InitialModel
from maskwise.functional import schedules
from maskwise.recipe.recipe import Recipe

# exact on the rows of a rank: elementwise, or with norms added up over ranks
SHARDABLE_OPTIMIZERS = ("adamw", "sgd", "lars")


def trainer(
    recipe: Recipe,
    world: World | None = None,
    *,
    images: int | None = None,
    classes: int | None = None,
    precision: str | None = None,
    start: InitialModel | None = None,
) -> Trainer:
    """Return the trainer of a recipe; `.step(global_crops, local_crops)` does one full step.

    The step of a supervised method takes (images, targets). images: length of the training set, which gives the steps
    of an epoch; classes: of a supervised method. By default both are read from the recipe's dataset. start: the model
    to continue from, by default the recipe's method.start_from.
    """
    start = start or initial_model(recipe)
    world = world or World.start()
    classes = classes or recipe.classifier.classes
    if images is None or (recipe.learns_labels and classes is None):
        data = dataset(recipe)
        images, classes = images or len(data), builder_for(recipe).classes(recipe, data)
    steps_per_epoch = max(1, loader.steps_per_epoch(images, recipe.train.batch_size))
    total = recipe.train.steps or recipe.train.epochs * steps_per_epoch
    precision = precision or resolved_precision(recipe, world.device)
    model = method(recipe, world, precision, start, classes)
    shards = shards_of(model, recipe, world, precision)
    groups = parameter_groups(model)
    check_groups(model, groups)
    optimizer = recipe.optimizer
    frozen_steps = 0
    if start:
        frozen_steps = round(
            start.warmup_epochs(recipe.method.head_warmup_epochs, total / steps_per_epoch) * steps_per_epoch
        )
    return Trainer(
        model,
        optimizer=make_optimizer(
            optimizer.name,
            shards.own_groups(groups) if shards else groups,
            shard_sum=shards.total if shards else None,
            **optimizer.keywords(),
        ),
        world=world,
        schedules=schedules_of(recipe, steps_per_epoch, total),
        clip=optimizer.clip,
        clip_mode=optimizer.clip_mode,
        freeze_last_layer=optimizer.freeze_last_layer,
        precision=precision,
        accumulate=recipe.train.accumulate,
        shards=shards,
        frozen=start.frozen_names([name for name, _ in model.named_parameters()]) if frozen_steps else (),
        freeze_steps=frozen_steps,
    )


def schedules_of(recipe: Recipe, steps_per_epoch: int, total: int) -> Schedules:
    """Return the learning rate, the weight decay and the teacher's momentum as functions of the step.

    Raises UserError for a warm-up and a decay that are longer than the run.
    """
    optimizer, teacher = recipe.optimizer, recipe.teacher
    momentum = teacher.momentum or 0.0
    if optimizer.schedule == "cosine":
        rate, other = schedules.cosine, schedules.cosine
    else:
        decay = optimizer.decay_steps(total)
        rate, other = partial(schedules.trapezoid, decay=decay), partial(schedules.late_cosine, decay=decay)
    made = Schedules(
        lr=partial(
            rate,
            total=total,
            start=optimizer.peak(recipe.train.batch_size),
            end=optimizer.min_lr,
            warmup=min(total, round(optimizer.warmup_epochs * steps_per_epoch)),
            warmup_start=optimizer.warmup_lr,
        ),
        weight_decay=partial(other, total=total, start=optimizer.weight_decay, end=optimizer.weight_decay_end),
        momentum=partial(
            other, total=total, start=momentum, end=momentum if teacher.momentum_end is None else teacher.momentum_end
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
    )
    made.lr(0)  # a warm-up that does not fit is an error before anything is written
    return made


def shards_of(model, recipe: Recipe, world: World, precision: str):
    """Return the method's ShardedMethod where speed.shard asks for them and there are several ranks.

    Without them, returns None and moves the method to its device.
    """
    kind = recipe.speed.shard
    if kind == "none" or world.size == 1:
        model.to(world.device)
        return None
    if recipe.speed.compile:
        raise UserError(f"speed.compile=true and speed.shard={kind} do not go together: leave one of them out")
    if recipe.optimizer.name not in SHARDABLE_OPTIMIZERS:
        raise UserError(
            f"optimizer {recipe.optimizer.name} does not support sharded tensors: choose "
            f"{', '.join(SHARDABLE_OPTIMIZERS)}, or speed.shard=none"
        )
    from maskwise.distributed.fsdp import ShardedMethod  # its imports take a second that only sharded runs need

    return ShardedMethod(model, world, kind, precision=precision)


def resolved_precision(recipe: Recipe, device: torch.device) -> str:
    """Return train.precision, with auto resolved to bf16 where the device computes in it."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # private functions of torch; where AVX-512 emulates bf16 products they take two to three times as long as float32's
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(test() for test in tests if test is not None) else "fp32"

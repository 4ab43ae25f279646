"""Advice on momentum, learning rate, temperature and batch size of a recipe, each line with its source."""

from __future__ import annotations

import math

from maskwise.recipe.recipe import Recipe

LOWEST, HIGHEST = 4.6875e-4, 2.03125e-3  # peak learning rates published with AdamW
HORIZON = 20  # a run should be at least this many times as long as the teacher's averaging window


def advice(recipe: Recipe, images: int) -> list[str]:
    """Lines of advice for a training set of `images` images; each names the key, a value and its source."""
    batch = recipe.train.batch_size
    per_epoch = max(1, images // batch)
    steps = recipe.train.steps or recipe.train.epochs * per_epoch
    if recipe.learns_labels:
        return epoch_length(images, per_epoch)
    if "head.prototypes" not in recipe.values:  # distillation has no prototypes, temperatures or moving teacher
        return [*learning_rate(recipe, batch), *epoch_length(images, per_epoch)]
    return [
        *momentum(recipe, batch, steps),
        *learning_rate(recipe, batch),
        *temperature(recipe, steps / per_epoch),
        *epoch_length(images, per_epoch),
        *head(recipe, images, per_epoch, steps),
    ]


def momentum(recipe: Recipe, batch: int, steps: int) -> list[str]:
    """The teacher's averaging window, 1 / (1 - momentum) steps, against the length of the run."""
    value = recipe.teacher.momentum
    window = 1 / (1 - value) if value < 1 else math.inf
    suggested = suggested_momentum(batch, steps)
    if window * HORIZON > steps:
        remedy = f"use {suggested:g}, or train longer" if suggested < value else "train longer"
        return [
            f"teacher.momentum {value:g} averages over {window:.0f} steps, and the run has {steps}: {remedy} "
            "(AttMask uses .99 on 20 % of ImageNet, .996 on all of it)"
        ]
    if batch < 128 and value < 0.9995 and steps >= 100_000:
        return [
            f"teacher.momentum {value:g} with batches of {batch}: the authors of DINO advise .9995 "
            "for small batches in long runs (their issue tracker)"
        ]
    return [f"teacher.momentum {value:g} fits {steps} steps of {batch} (published: .996 at batches of 240 to 1040)"]


def suggested_momentum(batch: int, steps: int) -> float:
    """The largest published momentum whose averaging window is at most a twentieth of the run."""
    largest = 0.9995 if batch < 128 and steps >= 100_000 else 0.996
    for value in (largest, 0.996, 0.99, 0.98, 0.95):
        if HORIZON / (1 - value) <= steps and value <= largest:
            return value
    return 0.9


def learning_rate(recipe: Recipe, batch: int) -> list[str]:
    """The peak learning rate against the published ones."""
    peak = recipe.optimizer.lr * batch / 256
    text = f"peak learning rate {peak:.3g} (optimizer.lr {recipe.optimizer.lr:g} x {batch} / 256)"
    published = f"{LOWEST:.3g} to {HIGHEST:.3g}"
    if recipe.optimizer.name != "adamw":
        return [f"{text}: published for SGD .06, for LARS 4.8 at 4080 images"]
    if peak > HIGHEST:
        return [
            f"{text} is above the published range ({published}): use optimizer.lr={HIGHEST * 256 / batch:.2g} at most, "
            "unless a short run of yours shows otherwise"
        ]
    if peak < LOWEST / 4:
        return [
            f"{text} is far below the published range ({published}): suitable for continuing from trained weights; "
            f"from scratch use about {LOWEST * 256 / batch:.2g}"
        ]
    return [f"{text} is in or near the published range ({published})"]


def temperature(recipe: Recipe, epochs: float) -> list[str]:
    """The teacher's final temperature and its warm-up."""
    teacher = recipe.teacher
    final = max(teacher.temp, getattr(teacher, "patch_temp", teacher.temp))
    warmup = teacher.warmup_temp_epochs
    lines = []
    too_short = epochs < 30 <= warmup or (epochs < 100 and warmup < epochs / 4)
    if final > 0.04 and too_short:
        lines.append(
            f"teacher.temp {final:g} in {epochs:.3g} epochs: published recipes reach .07 after 30 of at least "
            "100 epochs; keep .04 in shorter runs (lowering it is the authors' first remedy for a flat loss)"
        )
    if final > 0.07:
        lines.append(
            f"teacher.temp {final:g} is above .07, the highest published value: targets may become uniform; "
            "use .07 or less"
        )
    return lines or [
        f"teacher.temp {final:g} after {warmup} epochs is a published choice "
        "(.04 throughout, or .04 to .07 over 30 epochs)"
    ]


def head(recipe: Recipe, images: int, per_epoch: int, steps: int) -> list[str]:
    """Prototypes and the frozen last layer against the number of images."""
    lines = []
    if recipe.head.prototypes > images:
        enough = max(64, 2 ** int(math.log2(max(64, images // 8))))
        lines.append(
            f"head.prototypes {recipe.head.prototypes} is more than the {images} images: {enough} is enough "
            "(published: 8192 for 1.28 million)"
        )
    frozen = recipe.optimizer.freeze_last_layer * per_epoch
    if frozen > steps / 4:
        lines.append(
            f"optimizer.freeze_last_layer freezes the head's last layer for {frozen} of {steps} steps: "
            "use 0 in a run this short (published: 1 epoch of 100)"
        )
    if not recipe.head.norm_last_layer and images < 100_000:
        lines.append(
            "head.norm_last_layer=true is more stable on small data (false is published for ViT-S on ImageNet; "
            "DINO's own help warns that it can be unstable)"
        )
    return lines


def epoch_length(images: int, per_epoch: int) -> list[str]:
    """Epochs of few steps, where schedules per epoch change abruptly."""
    if per_epoch >= 20 or images // 50 < 8:
        return []
    return [
        f"{per_epoch} steps per epoch: schedules given in epochs change in large jumps; "
        f"a smaller train.batch_size (such as {images // 50}) makes them smoother"
    ]

"""What batch, data and length advise for momentum, learning rate and temperature, each line with its source."""

from __future__ import annotations

import math

from maskwise.recipe import Recipe

LOWEST, HIGHEST = 4.6875e-4, 2.03125e-3  # peak learning rates of the published AdamW rows
HORIZON = 20  # a teacher should have averaged over a run's steps this many times


def advice(recipe: Recipe, images: int) -> list[str]:
    """Lines on a recipe for a training set of so many images; each names what to set and where that comes from."""
    batch = recipe.train.batch_size
    per_epoch = max(1, images // batch)
    steps = recipe.train.steps or recipe.train.epochs * per_epoch
    epochs = steps / per_epoch
    if recipe.learns_labels:
        return smooth(images, per_epoch)
    return [*momentum(recipe, batch, steps), *rate(recipe, batch), *temperature(recipe, epochs), *data(recipe, images, batch, per_epoch, steps)]


def momentum(recipe: Recipe, batch: int, steps: int) -> list[str]:
    """The teacher's memory, 1 / (1 - momentum) steps, against the length of the run."""
    m = recipe.teacher.momentum
    memory = 1 / (1 - m) if m < 1 else math.inf
    fitting = suggested_momentum(batch, steps)
    remedy = f"give {fitting:g}, or train longer" if fitting < m else "train longer"
    if memory * HORIZON > steps:
        return [
            f"teacher.momentum {m:g} remembers {memory:.0f} steps and the run has {steps}: {remedy} "
            "(AttMask's rows on 20 % of ImageNet take .99 where the full set takes .996)"
        ]
    if batch < 128 and m < 0.9995 and steps >= 100_000:
        return [f"teacher.momentum {m:g} with batches of {batch}: the authors of DINO advise .9995 for small batches in long runs (their issue tracker)"]
    return [f"teacher.momentum {m:g} fits {steps} steps of {batch} (published: .996 at batches of 240 to 1040)"]


def suggested_momentum(batch: int, steps: int) -> float:
    """A momentum whose memory is a twentieth of the run at most, and no more than is published for the batch."""
    usual = 0.9995 if batch < 128 and steps >= 100_000 else 0.996
    for choice in (usual, 0.996, 0.99, 0.98, 0.95):
        if HORIZON / (1 - choice) <= steps and choice <= usual:
            return choice
    return 0.9


def rate(recipe: Recipe, batch: int) -> list[str]:
    """The peak learning rate against the published ones."""
    peak = recipe.optimizer.lr * batch / 256
    said = f"peak learning rate {peak:.3g} (optimizer.lr {recipe.optimizer.lr:g} x {batch} / 256)"
    if recipe.optimizer.name != "adamw":
        return [f"{said}: published for SGD .06, for LARS 4.8 at 4080 images"]
    if peak > HIGHEST:
        return [f"{said} is above every published one ({LOWEST:.3g} to {HIGHEST:.3g}): give optimizer.lr={HIGHEST * 256 / batch:.2g} at most, unless a short run of yours says otherwise"]
    if peak < LOWEST / 4:
        return [f"{said} is far below the published ones ({LOWEST:.3g} to {HIGHEST:.3g}): right for going on from trained weights; from scratch give about {LOWEST * 256 / batch:.2g}"]
    return [f"{said} lies where the published ones do, or near ({LOWEST:.3g} to {HIGHEST:.3g})"]


def temperature(recipe: Recipe, epochs: float) -> list[str]:
    """The teacher's final temperature and its warm-up."""
    teacher = recipe.teacher
    final = max(teacher.temp, getattr(teacher, "patch_temp", teacher.temp))
    lines = []
    if final > 0.04 and epochs < 30 <= teacher.warmup_temp_epochs or final > 0.04 and epochs < 100 and teacher.warmup_temp_epochs < epochs / 4:
        lines.append(
            f"teacher.temp {final:g} in {epochs:.3g} epochs: published rows reach .07 after 30 of at least 100 epochs; "
            "for shorter runs keep .04, lower targets being the authors' first remedy when a loss stays flat"
        )
    if final > 0.07:
        lines.append(f"teacher.temp {final:g} is above .07, the highest that is published: targets may become uniform; give .07 or less")
    return lines or [f"teacher.temp {final:g} after {teacher.warmup_temp_epochs} epochs is a published choice (.04 throughout, or .04 to .07 over 30 epochs)"]


def data(recipe: Recipe, images: int, batch: int, per_epoch: int, steps: int) -> list[str]:
    """Batch, prototypes and the frozen last layer against the number of images."""
    lines = smooth(images, per_epoch)
    if recipe.head.prototypes > images:
        lines.append(f"head.prototypes {recipe.head.prototypes} for {images} images: more kinds than images; {max(64, 2 ** int(math.log2(max(64, images // 8))))} is enough (published: 8192 for 1.28 million)")
    frozen = recipe.optimizer.freeze_last_layer * per_epoch
    if frozen > steps / 4:
        lines.append(f"optimizer.freeze_last_layer holds the head's last layer for {frozen} of {steps} steps: give 0 in a run this short (published: 1 epoch of 100)")
    if not recipe.head.norm_last_layer and images < 100_000:
        lines.append("head.norm_last_layer=true is the steadier choice for small data (false is the published choice for ViT-S on ImageNet; DINO's own help warns that it can be unstable)")
    return lines


def smooth(images: int, per_epoch: int) -> list[str]:
    """The steps of an epoch."""
    if per_epoch >= 20 or images // 50 < 8:
        return []
    return [f"{per_epoch} steps an epoch: schedules in epochs move in leaps; a smaller train.batch_size (such as {images // 50}) makes them smoother"]

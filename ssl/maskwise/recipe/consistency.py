"""Conflicts in a recipe: values that are valid alone and cannot be combined."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from maskwise.data.loader import check_batch_size
from maskwise.errors import UserError
from maskwise.imaging.resize import pair
from maskwise.recipe import run_length
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import learns_labels, named
from maskwise.recipe.sections import DECAY_SHARE

Conflict = tuple[str, str]  # all keys that it depends on, separated by blanks, the worst first; and the text
SIZES = {"crops.global_size", "crops.local_size", "crops.local_number", "augment.size"}
REFUSALS = (UserError, KeyError)  # of a model that cannot be built; timm looks names of layers up in a dict


def conflicts(values: Mapping[str, Any], doubtful: Collection[str] = ()) -> list[Conflict]:
    """Return the conflicts between the resolved values of a recipe, of which some keys may be doubtful."""
    checks = [holdout_conflicts, start_conflicts, rate_conflicts, decay_conflicts, range_conflicts, channel_conflicts]
    checks.append(patch_conflicts)
    if "method.name" not in doubtful:
        checks += (
            [label_conflicts]
            if learns_labels(values["method.name"])
            else [teacher_conflicts, masking_conflicts, koleo_conflicts]
        )
    return [conflict for check in checks for conflict in check(values)]


def start_conflicts(values) -> list[Conflict]:
    """Return keys that need method.start_from, and keys that it excludes."""
    if values.get("method.start_from") is None:
        defaults = {"method.head_warmup_epochs": None, "method.start_head": "auto"}
        return [
            (f"{key} method.start_from", "nothing to continue from; give method.start_from, or leave this out")
            for key, default in defaults.items()
            if values.get(key, default) != default
        ]
    if values.get("backbone.weights") is not None:
        text = "method.start_from brings the weights; leave backbone.weights out"
        return [("backbone.weights method.start_from", text)]
    return []


def holdout_conflicts(values) -> list[Conflict]:
    """Return held-out images beside other test images."""
    if values.get("data.holdout") is None:
        return []
    if values["data.name"] == "shapes":
        return [("data.holdout data.name", "`shapes` makes its own test images; leave it out")]
    others = [key for key in ("data.test_path", "data.test_split") if values.get(key) is not None]
    return [
        (f"data.holdout {key}", f"the test images are those of {key}; give {key}=null, or leave this out")
        for key in others[:1]
    ]


def rate_conflicts(values) -> list[Conflict]:
    """Return learning rates above the peak of the schedule."""
    problems, per = [], values["optimizer.lr_per"]
    peak = values["optimizer.lr"] * (values["train.batch_size"] / per if per else 1)
    rule = f"optimizer.lr x train.batch_size / {per}" if per else "optimizer.lr"
    for key in ("optimizer.min_lr", "optimizer.warmup_lr"):
        if values[key] > peak:
            text = f"{values[key]:g} is above the peak learning rate {peak:g} ({rule}); lower it"
            problems.append((f"{key} optimizer.lr train.batch_size optimizer.lr_per", text))
    return problems


def decay_conflicts(values) -> list[Conflict]:
    """Return a decay that nothing reads, or that leaves no room for the warm-up."""
    share, schedule = values["optimizer.decay_share"], values["optimizer.schedule"]
    if schedule != "wsd":
        text = "is read with optimizer.schedule=wsd only; leave it out"
        return [("optimizer.decay_share optimizer.schedule", text)] if share is not None else []
    share = DECAY_SHARE if share is None else share
    warmup, epochs = values["optimizer.warmup_epochs"], values["train.epochs"]
    if values["train.steps"] is None and warmup > (1 - share) * epochs:
        keys = "optimizer.warmup_epochs optimizer.decay_share optimizer.schedule train.epochs train.steps"
        text = (
            f"a warm-up of {warmup:g} epochs and the decay in the last {share * epochs:g} are longer than the run of "
            f"{epochs}; shorten one of them, or train longer"
        )
        return [(keys, text)]
    return []


def range_conflicts(values) -> list[Conflict]:
    """Return ranges that run from high to low."""
    keys = ("crops.global_scale", "crops.local_scale", "crops.blur_sigma", "augment.scale", "augment.ratio")
    ranges = {key: values[key] for key in keys if key in values}
    return [(key, f"runs from low to high, not [{low}, {high}]") for key, (low, high) in ranges.items() if low > high]


def channel_conflicts(values) -> list[Conflict]:
    """Return the first fault of data.mean and data.std."""
    mean, std = values.get("data.mean"), values.get("data.std")
    if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
        return [("data.mean data.std", "data.mean and data.std go together; give both, one number for each channel")]
    if mean is None:
        return []
    if not mean or min(std) <= 0:
        return [("data.std data.mean", "must be above 0 in every channel, and there is at least one")]
    if len(mean) != 3 and values["data.name"] == "shapes":
        text = "`shapes` are pictures of three channels; give three numbers, or leave it out"
        return [("data.mean data.name", text)]
    return []


def patch_conflicts(values) -> list[Conflict]:
    """Return sizes that are no multiple of the patch size, by default that in the model's name."""
    patch = values.get("backbone.patch_size")
    if patch is None:
        in_name = re.search(r"patch(\d+)", values["backbone.name"])
        patch = int(in_name.group(1)) if in_name else 1
    keys = ("augment.size", "crops.global_size", "crops.local_size", "backbone.image_size")
    sizes = {key: pair(values[key]) for key in keys if values.get(key)}
    if values.get("crops.local_number") == 0:
        del sizes["crops.local_size"]
    problems = []
    for key, size in sizes.items():
        steps = pair(patch)
        wrong = [(side, step) for side, step in zip(size, steps) if side % step]
        if wrong:
            side, step = wrong[0]
            near = [max(step, step * round(side / step)) for side, step in zip(size, steps)]
            take = near if isinstance(values[key], tuple) else near[0]
            text = f"{side} pixels are not a multiple of the patch size {step}; take {take}"
            number = " crops.local_number" if key == "crops.local_size" else ""
            problems.append((f"{key} backbone.patch_size backbone.name{number} method.name", text))
    return problems


def label_conflicts(values) -> list[Conflict]:
    """Return conflicts between views, mixing and losses of supervised training."""
    problems = []
    views = values["augment.splits"]
    if views > 1 and (values["augment.mixup"] or values["augment.cutmix"]):
        key = "augment.mixup" if values["augment.mixup"] else "augment.cutmix"
        text = "several views of an image are not mixed with others; give 0, or augment.splits=1"
        problems.append((f"{key} augment.splits", text))
    if values["augment.skip_first"] and views == 1:
        text = "the first view is the only one; give augment.splits=3, or false"
        problems.append(("augment.skip_first augment.splits", text))
    if values.get("method.jsd_weight") and views == 1:
        text = "compares views of an image, and there is only one; set augment.splits=3, or 0"
        problems.append(("method.jsd_weight augment.splits", text))
    if values.get("method.bce_threshold") is not None and values.get("method.loss") != "bce":
        problems.append(("method.bce_threshold method.loss", "is read with method.loss=bce only; leave it out"))
    return problems


def teacher_conflicts(values) -> list[Conflict]:
    """Return a missing teacher momentum, which self-distillation needs."""
    if values["teacher.momentum"] is not None or not getattr(
        named("method", values["method.name"]), "needs_momentum", 1
    ):
        return []
    text = "the teacher learns as the moving average of the student; give a momentum such as 0.996"
    return [("teacher.momentum", text)]


def koleo_conflicts(values) -> list[Conflict]:
    """Return KoLeo in batches of one image, which have no nearest other."""
    if not values.get("method.koleo") or values["train.batch_size"] > 1:
        return []
    text = "compares the images of a batch, and train.batch_size is 1; give 0, or two images or more"
    return [("method.koleo train.batch_size", text)]


def masking_conflicts(values) -> list[Conflict]:
    """Return ratios outside 0..1, and what masking and pooling lack of each other or of the backbone."""
    problems = ratio_conflicts(values)
    pooling, masking = values["pooling.name"], values["masking.name"]
    pooling_cls, masking_cls = named("pooling", pooling), named("masking", masking)
    # external classes need not derive from Pooling and Masking
    needs_cls = "cls_attention" in getattr(pooling_cls, "needs", ())
    if needs_cls and values.get("backbone.class_token") is False:
        text = f"`{pooling}` needs a class token and backbone.class_token is false; use simpool, or keep the token"
        problems.append(("pooling.name backbone.class_token", text))
    elif getattr(masking_cls, "needs_attention", False) and not getattr(pooling_cls, "gives_attention", True):
        from maskwise.nn.pooling import with_attention

        text = (
            f"`{masking}` hides what the teacher attends to, and pooling `{pooling}` has no attention; use one that "
            f"has ({with_attention()}), or mask at random"
        )
        problems.append(("masking.name pooling.name", text))
    return problems


def ratio_conflicts(values) -> list[Conflict]:
    """Return mask ratios whose intervals do not match, or leave 0..1."""
    ratio, var = values.get("masking.ratio"), values.get("masking.var")
    if ratio is None or var is None:
        return []
    ratios = ratio if isinstance(ratio, tuple) else (ratio,)
    widths = var if isinstance(var, tuple) else (var,)
    if len(ratios) != len(widths):
        text = f"has {len(ratios)} entries and masking.var has {len(widths)}; give as many"
        return [("masking.ratio masking.var", text)]
    if any(middle - width < 0 or middle + width > 1 for middle, width in zip(ratios, widths)):
        return [("masking.var masking.ratio", f"masking.ratio {ratio} +- {var} goes outside 0..1; narrow it")]
    return []


def unbuildable(values: Mapping[str, Any], doubtful: Collection[str] = ()) -> list[Conflict]:
    """Build the model on the meta device, without memory or random numbers; returns the refusals of its parts.

    A part with doubtful keys is not built, nor are those that need it.
    """
    import torch

    from maskwise.nn import Encoder, ProjectionHead

    doubtful_sections = {key.partition(".")[0] for key in doubtful}
    if "backbone" in doubtful_sections or not {*SIZES, "method.name"}.isdisjoint(doubtful):
        return []
    arguments = model_arguments(values)
    sizes = ["augment.size" if "augment.size" in values else "crops.global_size"]
    sizes += ["crops.local_size"] if values.get("crops.local_number") else []
    refused: list[Conflict] = []
    encoder = None
    with torch.device("meta"):
        try:
            backbone = named("backbone", values["backbone.name"])(values["backbone.name"], **arguments["backbone"])
        except REFUSALS as error:
            return [refusal("backbone", error, values)]
        for key in sizes:
            try:
                backbone.check_size(pair(values[key]))
            except UserError as error:
                keys, text = refusal("backbone", error, values)
                refused.append((f"{key} {keys}", text))
        if "pooling" not in doubtful_sections:
            try:
                pooling = named("pooling", values["pooling.name"])(backbone.dim, **arguments["pooling"])
                encoder = Encoder(backbone, pooling, norm=values["pooling.norm"])
            except REFUSALS as error:
                refused.append(refusal("pooling", error, values))
        section = "classifier" if learns_labels(values["method.name"]) else "head"
        absent = not any(key.startswith(section + ".") for key in values)
        if absent or section in doubtful_sections or (section == "classifier" and encoder is None):
            return refused
        try:
            if section == "head":
                ProjectionHead(backbone.dim, **arguments["head"])
            else:
                classes = values["classifier.classes"] or 2
                named(section, values["classifier.name"])(encoder, classes, **arguments[section])
        except REFUSALS as error:
            refused.append(refusal(section, error, values))
    return refused


def refusal(section: str, error: Exception, values: Mapping[str, Any]) -> Conflict:
    """Return what a part of the model refused, blamed on the keys that the text states."""
    text = f"timm has no layer {error}" if isinstance(error, KeyError) else str(error)
    keys = [key for key in values if key.startswith(section + ".")]
    blamed = [key for key in keys if f"{key.partition('.')[2]}={values[key]}" in text]
    return " ".join([section, *blamed, *keys]), text


def model_arguments(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the constructor arguments of backbone, pooling, head and classifier, pretrained weights left out."""
    skipped = {"backbone.name", "backbone.weights", "pooling.name", "pooling.norm"}
    skipped |= {"classifier.name", "classifier.classes"}
    arguments: dict[str, dict[str, Any]] = {section: {} for section in ("backbone", "pooling", "head", "classifier")}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section in arguments and key not in skipped:
            arguments[section][name] = value
    image_size = values.get("backbone.image_size") or values.get("augment.size") or values["crops.global_size"]
    arguments["backbone"] |= {
        "mean": values.get("data.mean"),
        "std": values.get("data.std"),
        "image_size": image_size,
        "mask_token": values.get("masking.name", "none") != "none",
    }
    return arguments


def fitted(recipe: Recipe, images: int, world_size: int) -> Recipe:
    """Return a recipe with its schedules fitted to a run of train.steps on that many training images.

    Raises UserError when it cannot run on that many images and ranks.
    """
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if world_size > images:
        raise UserError(f"more ranks ({world_size}) than images ({images}); start fewer ranks or give more images")
    check_batch_size(batch, images, world_size)
    if batch // world_size % accumulate:
        share = "" if world_size == 1 else f" / {world_size} ranks"
        raise UserError(
            f"train.batch_size {batch}{share} does not divide into train.accumulate={accumulate} micro-batches; give a "
            "divisor"
        )
    if (recipe.augment.mixup or recipe.augment.cutmix) and batch // world_size % 2:
        raise UserError(
            f"train.batch_size {batch} leaves {batch // world_size} images to a rank, which cannot be mixed in pairs; "
            f"give train.batch_size={batch + world_size}"
        )
    if recipe.train.steps is None:
        return recipe
    steps_per_epoch = images // batch
    length = f"train.steps={recipe.train.steps} is {recipe.train.steps / steps_per_epoch:.3g} epochs of {images} images"
    fit = run_length.fit(recipe.values, recipe.intended, steps_per_epoch, length)
    for keys, text in fit.conflicts:
        raise UserError(f"{keys.split()[0]}: {text}")
    return recipe.with_values(fit.values, fit.notes) if fit.values or fit.notes else recipe

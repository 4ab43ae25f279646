"""What is wrong with values that are fine alone and cannot stand together in a recipe."""

from __future__ import annotations

import re

from maskwise.functional.errors import UserError
from maskwise.recipe_schema import named


def contradictions(values: dict[str, object]) -> list[tuple[str, str]]:
    """What is wrong with values that are fine alone and cannot stand together: (the keys concerned, the worst first; the text)."""
    get, found = values.get, []
    epochs = get("train.epochs")
    if get("train.steps") is None:
        for key, what in (("optimizer.warmup_epochs", "the learning-rate warm-up"), ("teacher.warmup_temp_epochs", "the temperature warm-up")):
            if get(key, 0) > epochs:
                text = f"{what} ({get(key):g} epochs) is longer than the run (train.epochs is {epochs}); shorten it or lengthen the run"
                found.append((f"{key} train.epochs", text))
        if get("method.start_epoch", 0) >= epochs:
            text = f"masking would start at epoch {get('method.start_epoch')} of a run of {epochs}; start it earlier"
            found.append(("method.start_epoch train.epochs", text))
    found += start_contradictions(values)
    per = get("optimizer.lr_per")
    peak = get("optimizer.lr") * (get("train.batch_size") / per if per else 1)
    for key in ("optimizer.min_lr", "optimizer.warmup_lr"):
        if get(key) > peak:
            text = f"{get(key):g} is above the peak learning rate {peak:g} (optimizer.lr{f' x train.batch_size / {per}' if per else ''}); lower it"
            found.append((f"{key} optimizer.lr train.batch_size", text))
    for key in ("crops.global_scale", "crops.local_scale", "crops.blur_sigma", "augment.scale", "augment.ratio"):
        low, high = get(key, (0, 0))
        if low > high:
            found.append((key, f"runs from low to high, not [{low}, {high}]"))
    mean, std = get("data.mean"), get("data.std")
    if (mean is None) != (std is None) or mean is not None and len(mean) != len(std):
        found.append(("data.mean data.std", "data.mean and data.std go together; give both, one number for each channel"))
    elif mean is not None and (not mean or min(std) <= 0):
        found.append(("data.std data.mean", "must be above 0 in every channel, and there is at least one"))
    elif mean is not None and len(mean) != 3 and get("data.name") == "shapes":
        found.append(("data.mean data.name", "`shapes` are pictures of three channels; give three numbers, or leave it out"))
    return found + patch_contradictions(values) + (label_contradictions(values) if "augment.size" in values else masking_contradictions(values))


def label_contradictions(values) -> list[tuple[str, str]]:
    """What views, mixing and losses of labels ask of one another."""
    found = []
    if values["augment.splits"] > 1 and (values["augment.mixup"] or values["augment.cutmix"]):
        key = "augment.mixup" if values["augment.mixup"] else "augment.cutmix"
        found.append((f"{key} augment.splits", "several views of an image are not mixed with others; give 0, or augment.splits=1"))
    if values["augment.spare_first"] and values["augment.splits"] == 1:
        found.append(("augment.spare_first augment.splits", "the first view is the only one; give augment.splits=3, or false"))
    if values.get("method.jsd_weight") and values["augment.splits"] == 1:
        found.append(("method.jsd_weight augment.splits", "compares views of an image and there is one; give augment.splits=3, or 0"))
    if values.get("method.bce_threshold") is not None and values.get("method.loss") != "bce":
        found.append(("method.bce_threshold method.loss", "is read with method.loss=bce only; leave it out"))
    return found


def start_contradictions(values) -> list[tuple[str, str]]:
    """Keys that only a start model gives a meaning to, and what it cannot stand beside."""
    if values.get("method.start_from") is None:
        keys = {"method.head_warmup_epochs": None, "method.start_head": "auto"}
        return [(f"{key} method.start_from", "nothing to continue from; give method.start_from, or leave this out") for key, usual in keys.items() if values.get(key, usual) != usual]
    found = []
    warmup = values.get("method.head_warmup_epochs") or 0
    if values.get("train.steps") is None and warmup >= values["train.epochs"]:
        text = f"the head warm-up ({warmup:g} epochs) leaves nothing of the run (train.epochs is {values['train.epochs']}); shorten it or lengthen the run"
        found.append(("method.head_warmup_epochs train.epochs", text))
    if values.get("backbone.weights") is not None:
        found.append(("backbone.weights method.start_from", "method.start_from brings the weights; leave backbone.weights out"))
    return found


def patch_contradictions(values) -> list[tuple[str, str]]:
    """Sizes that do not divide into patches; without backbone.patch_size the model's name tells the patch size."""
    patch = values.get("backbone.patch_size")
    if patch is None:
        inside = re.search(r"patch(\d+)", values["backbone.name"])
        patch = int(inside.group(1)) if inside else 1
    sizes = {key: values[key] for key in ("augment.size", "crops.global_size", "crops.local_size", "backbone.image_size") if values.get(key)}
    if values.get("crops.local_number") == 0:
        del sizes["crops.local_size"]
    found = []
    for key, size in sizes.items():
        for side, step in zip(size if isinstance(size, tuple) else (size, size), patch if isinstance(patch, tuple) else (patch, patch)):
            if side % step:
                near = max(step, step * round(side / step))
                found.append((f"{key} backbone.patch_size backbone.name", f"{side} pixels are not a multiple of the patch size {step}; take {near}"))
                break
    return found


def masking_contradictions(values) -> list[tuple[str, str]]:
    """Ratios outside 0..1, and what masking and pooling ask of the attention."""
    from maskwise.nn.pooling import with_attention

    found = []
    if values["teacher.momentum"] is None:
        found.append(("teacher.momentum", "the teacher learns as the moving average of the student; give a momentum such as 0.996"))
    ratio, var = (each if isinstance(each, tuple) else (each,) for each in (values.get("masking.ratio"), values.get("masking.var")))
    if None not in (*ratio, *var):
        if len(ratio) != len(var):
            found.append(("masking.ratio masking.var", f"has {len(ratio)} entries and masking.var has {len(var)}; give as many"))
        elif any(r - v < 0 or r + v > 1 for r, v in zip(ratio, var)):
            found.append(("masking.var masking.ratio", f"masking.ratio {values['masking.ratio']} +- {values['masking.var']} leaves 0..1; narrow it"))
    pooling, masking = values["pooling.name"], values["masking.name"]
    row = named("pooling", pooling)
    if "cls_attention" in getattr(row, "needs", ()) and values.get("backbone.class_token") is False:
        text = f"`{pooling}` needs a class token and backbone.class_token is false; use simpool, or keep the token"
        found.append(("pooling.name backbone.class_token", text))
    elif getattr(named("masking", masking), "needs_attention", False) and not getattr(row, "gives_attention", True):
        text = f"`{masking}` hides what the teacher attends to, and pooling `{pooling}` has no attention; use one that has ({with_attention()}), or mask at random"
        found.append(("masking.name pooling.name", text))
    return found


def unbuildable(values: dict[str, object]) -> list[tuple[str, str]]:
    """What the model's parts say of their arguments, asked without memory or random numbers; as `contradictions` tells it."""
    import torch

    from maskwise.nn import Encoder, ProjectionHead

    arguments: dict[str, dict[str, object]] = {section: {} for section in ("backbone", "pooling", "head", "classifier")}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section in arguments and key not in ("backbone.name", "backbone.weights", "pooling.name", "pooling.norm", "classifier.name", "classifier.classes"):
            arguments[section][name] = value
    arguments["backbone"].update(mean=values.get("data.mean"), std=values.get("data.std"))
    arguments["backbone"]["image_size"] = values.get("backbone.image_size") or values.get("augment.size") or values["crops.global_size"]
    arguments["backbone"]["mask_token"] = values.get("masking.name", "none") != "none"
    section = "backbone"
    try:
        with torch.device("meta"):
            backbone = named("backbone", values["backbone.name"])(values["backbone.name"], **arguments["backbone"])
            for size in (values.get("augment.size") or values["crops.global_size"], values.get("crops.local_number") and values["crops.local_size"]):
                if size:
                    backbone.check_size((size, size))
            section = "pooling"
            pooling = named("pooling", values["pooling.name"])(backbone.dim, **arguments["pooling"])
            encoder = Encoder(backbone, pooling, norm=values["pooling.norm"])
            section = "head"
            if "classifier.name" not in values:
                ProjectionHead(backbone.dim, **arguments["head"])
                return []
            section = "classifier"
            named(section, values["classifier.name"])(encoder, values["classifier.classes"] or 2, **arguments[section])
    except (UserError, KeyError) as error:
        text = f"timm knows no layer {error}" if isinstance(error, KeyError) else str(error)
        inside = [key for key in values if key.startswith(section + ".")]
        blamed = [key for key in inside if f"{key.partition('.')[2]}={values[key]}" in text]
        return [(" ".join([section, *blamed, *inside]), text)]
    return []

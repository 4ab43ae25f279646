"""Suggest a recipe for a folder of images: settings chosen for the device and the data, each with its reason."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwise.data.class_matching import unknown_classes
from maskwise.data.datasets import DATASETS, holdout
from maskwise.data.datasets.folder import TEST_NAMES, TRAIN_NAMES
from maskwise.data.decoding.image import CorruptImage
from maskwise.distributed.environment import world_size
from maskwise.distributed.world import World
from maskwise.doctor.advice import suggested_momentum
from maskwise.doctor.measure import measure
from maskwise.doctor.regimes import MANY, REGIMES, Measured, Regime, regime_of
from maskwise.errors import UserError
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.yaml_text import write

PROBED = 16  # images whose sizes are read
LONG = 100  # epochs from which the schedules in epochs are the published ones
HOLDOUT = 0.1  # share of labeled images without a test split
FEW_CLASSES = 2  # that must give a held-out image
COST_SECONDS = 6.0  # of measuring the training step

TITLE = """\
# {title}: chosen for {summary}.
# Edit as needed; `maskwise show FILE` prints all other keys, `maskwise doctor FILE` measures the cost of a run.

seed: 0
"""
NO_KNN = "no labeled test images; give data.test_path, data.test_split or data.holdout to evaluate k-NN during training"
SECTIONS = (
    *("data", "crops", "backbone", "pooling", "head", "method", "masking", "teacher", "optimizer", "train"),
    "evaluate",
)


@dataclass(frozen=True)
class Suggestion:
    """A recipe as text, and the reasons for its settings, one line each."""

    text: str
    reasons: list[str]


@dataclass(frozen=True)
class Images:
    """A set of images: count in training, typical short side in pixels, keys of section `data`, labels, held out."""

    count: int
    side: int
    keys: dict
    labeled: bool
    held: int = 0


@dataclass(frozen=True)
class Choice:
    """Settings chosen for a device and a set of images: recipe keys, comments on keys, section -> (value, reason)."""

    title: str
    keys: Mapping[str, Any]
    comments: Mapping[str, str]
    reasons: Mapping[str, tuple[str, str]]
    measured: Measured | None


def suggest(path: str | Path, device: torch.device, *, masked: bool = False) -> Suggestion:
    """Suggest a recipe for the images at `path`: a folder, with or without train/ and val/, or a list file.

    masked: a Vision Transformer trained with AttMask whatever the device and the number of images. Raises UserError if
    there are fewer than two readable images.
    """
    images = look_at(Path(path).expanduser())
    several = device.type == "cpu" and world_size() > 1  # batch norm is not synchronized on CPUs
    regime = REGIMES[regime_of(device.type, images.side, images.count, masked=masked or several)]
    choice = choose(regime, images)
    kind = "labeled images" if images.labeled else "images"
    place = "a GPU" if device.type == "cuda" else f"{world_size()} CPU ranks" if several else "a CPU"
    summary = f"{images.count + images.held} {kind} of about {images.side} px on {place}"
    reasons = [
        f"  {section}: {value}" + (f" ({reason})" if reason else "")
        for section, (value, reason) in choice.reasons.items()
    ]
    text = TITLE.format(title=choice.title, summary=summary) + "".join(
        section_yaml(section, images, choice) for section in SECTIONS
    )
    return Suggestion(text, [f"{summary}: {choice.title}", *reasons, f"  expected: {expected(choice.measured)}"])


def look_at(path: Path) -> Images:
    """Open the images and read the sizes of a few."""
    keys: dict = {"name": "list" if path.is_file() else "folder", "path": os.path.abspath(path)}
    if path.is_dir():
        folders = {entry.name.lower(): entry.name for entry in path.iterdir() if entry.is_dir()}
        train, test = (
            next((folders[name] for name in names if name in folders), None) for names in (TRAIN_NAMES, TEST_NAMES)
        )
        if train and test:  # either alone may be a class
            keys.update(split=train, test_split=test)
    data = DATASETS[keys["name"]](path=path, split=keys.get("split"))
    if len(data) < 2:
        raise UserError(f"{path} has only one image; training needs at least 2, and thousands to learn anything")
    side = median_side(data, path)
    if "test_split" in keys and not has_labeled_test(path, keys["test_split"], data):
        del keys["test_split"]
    held = 0
    if "test_split" not in keys and data.labels is not None:
        held = held_out(np.asarray(data.labels))
        keys |= {"holdout": HOLDOUT} if held else {}
    return Images(len(data) - held, side, keys, data.labels is not None, held)


def held_out(labels: np.ndarray) -> int:
    """Return the number of images that data.holdout would hold out, 0 where fewer than FEW_CLASSES classes give one."""
    rows = holdout.held_out_rows([str(row) for row in range(len(labels))], labels, HOLDOUT)
    return len(rows) if len(np.unique(labels[rows])) >= FEW_CLASSES else 0


def median_side(data, path: Path) -> int:
    """Median short side in pixels of a few images. Raises UserError if none can be read."""
    count = min(PROBED, len(data))
    sides = []
    for i in range(count):
        try:
            sides.append(min(data.image(i * len(data) // count).shape[1:]))
        except CorruptImage:
            continue
    if not sides:
        raise UserError(f"{path}: none of the {count} images tried can be read; check the files")
    return sorted(sides)[len(sides) // 2]


def has_labeled_test(path: Path, split: str, train) -> bool:
    """Whether the test split has labels, all of classes of the training images."""
    if train.labels is None:
        return False
    test = DATASETS["folder"](path=path, split=split)
    return test.labels is not None and not unknown_classes(test, train)


def choose(regime: Regime, images: Images) -> Choice:
    """Fit the settings of a regime to the number of images."""
    keys = dict(regime.keys)
    transformer = keys["method.name"] == "ibot"
    published = "head.prototypes" not in keys and images.count >= MANY  # the settings for ImageNet
    batch_size = batch_size_for(images.count, 240 if published else regime.batch_size)
    epochs = 100 if published else epochs_for(images.count, regime.views, *regime.epochs)
    steps_per_epoch = images.count // batch_size
    steps, long = epochs * steps_per_epoch, epochs >= LONG
    if published:
        keys["crops.local_number"] = 10
    if transformer:
        follow_length(keys, images.count, long=long)
    if keys.get("method.targets") == "sinkhorn":
        keys["head.prototypes"] = min(keys["head.prototypes"], batch_size)
    keys.setdefault("teacher.momentum", suggested_momentum(batch_size, steps))
    keys.setdefault("optimizer.warmup_epochs", 10 if long else max(1, epochs // 10))
    keys |= {"train.epochs": epochs, "train.batch_size": batch_size}
    tested = "test_split" in images.keys or "holdout" in images.keys
    keys["evaluate.knn_every"] = max(1, epochs // 5) if tested else 0
    if tested:
        keys["evaluate.k"] = [10, 20]
    if keys["crops.global_size"] < 112:
        keys["evaluate.crop_pct"] = 1.0
    title = regime.title + (", the published settings for ImageNet" if published and images.side >= 64 else "")
    comments = {
        "head.prototypes": "published: 8192 for 1.28 million images" if transformer else "",
        "optimizer.lr": f"per 256 images: peak {keys['optimizer.lr'] * batch_size / 256:.3g}",
        "evaluate.knn_every": "epochs between k-NN evaluations on the test images" if tested else NO_KNN,
    }
    return Choice(title, keys, comments, reasons_of(regime, keys, images, steps), regime.measured)


def follow_length(keys: dict, count: int, *, long: bool) -> None:
    """Set what iBOT's masking, temperatures and head owe to the number of images and the length of the run."""
    defaults = {
        "head.prototypes": prototypes_for(count),
        "head.norm_last_layer": count < MANY,
        "masking.name": "attmask_hint" if long else "attmask_high",
        "masking.ratio": 0.3,
        "masking.var": 0.2,
        "masking.prob": 0.5,
        "teacher.temp": 0.07 if long else 0.04,
        "teacher.warmup_temp": 0.04,
        "teacher.warmup_temp_epochs": 30 if long else 0,
        "teacher.patch_temp": 0.07 if long else 0.04,
        "teacher.warmup_patch_temp": 0.04,
        "optimizer.freeze_last_layer": 1 if long else 0,
    }
    for key, value in defaults.items():
        keys.setdefault(key, value)


def reasons_of(regime: Regime, keys: Mapping[str, Any], images: Images, steps: int) -> dict[str, tuple[str, str]]:
    """Return section -> (its choice in words, the reason)."""
    size, local, number = (keys[f"crops.{name}"] for name in ("global_size", "local_size", "local_number"))
    epochs, batch_size = keys["train.epochs"], keys["train.batch_size"]
    warming = f" to {keys['teacher.temp']:g}" if keys["teacher.temp"] > keys["teacher.warmup_temp"] else ""
    words = {
        "backbone": network_in_words(keys),
        "crops": f"2 x {size}" + (f" + {number} x {local} px" if number else " px"),
        "pooling": keys["pooling"],
        "optimizer": f"{keys.get('optimizer.name', 'adamw')}, learning rate {keys['optimizer.lr']:g} per 256 images",
        "train": f"{epochs} epochs of {images.count // batch_size} steps of {batch_size}",
        "teacher": f"momentum {keys['teacher.momentum']:g}, temperature {keys['teacher.warmup_temp']:g}{warming}",
    }
    reasons = {
        "train": f"{steps} steps, about {images.count * epochs / 1e6:.3g} million images seen",
        "teacher": "short runs need a fast teacher and sharp targets" if epochs < LONG else "by the length of the run",
        **regime.reasons,
    }
    chosen = {section: (value, reasons.get(section, "")) for section, value in words.items()}
    if images.held:
        text = f"k-NN on {images.held} images that are held out and not trained"
        chosen["evaluate"] = (text, f"there are no test images; data.holdout={HOLDOUT:g}")
    return chosen


def network_in_words(keys: Mapping[str, Any]) -> str:
    """Describe the backbone."""
    text = keys["backbone.name"]
    if widths := keys.get("backbone.channels"):
        text += f", {widths[0]} to {widths[-1]} channels"
    if depth := keys.get("backbone.depth"):
        text += f", {depth} blocks of width {keys.get('backbone.embed_dim', 192)}"
    return text + (f", patches of {keys['backbone.patch_size']}" if "backbone.patch_size" in keys else "")


def expected(measured: Measured | None) -> str:
    """Describe what a run of a regime reached, beside its baselines."""
    if measured is None:
        return (
            "not yet measured; `maskwise report RUN --measure` compares k-NN with the untrained network and raw pixels"
        )
    baselines = {
        "untrained": measured.untrained,
        "raw pixels": measured.raw_pixels,
        "PCA-whitened pixels": measured.whitened_pixels,
    }
    texts = [f"{name} {'not yet measured' if value is None else f'{value:g} %'}" for name, value in baselines.items()]
    images = f"{measured.images} images of {measured.data} in {measured.epochs} epochs"
    return f"k-NN {measured.knn:g} % was reached on {images} ({', '.join(texts)})"


def cost(recipe: Recipe, device: torch.device) -> str:
    """Return the expected time of a run in words, from a few of its steps on this machine."""
    if world_size() > 1:  # the ranks would compete for the machine
        return "not estimated with several ranks"
    measured = measure(recipe, COST_SECONDS, World(device=device))
    steps = recipe.train.steps or recipe.train.epochs * (measured.images // recipe.train.batch_size)
    seconds = steps * recipe.train.batch_size / measured.rate
    return f"about {in_words(seconds)} on this machine ({measured.rate:.3g} images/s), evaluations not included"


def in_words(seconds: float) -> str:
    """Return a duration rounded to two digits."""
    for limit, unit, name in ((120, 1, "seconds"), (7200, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            return f"{float(f'{seconds / unit:.2g}'):g} {name}"
    return f"{float(f'{seconds / 86400:.2g}'):g} days"


def prototypes_for(count: int) -> int:
    """Number of prototypes on a GPU."""
    if count >= MANY:
        return 8192
    return 4096 if count >= 20_000 else 1024


def batch_size_for(count: int, largest: int) -> int:
    """`largest`, or a power of two that leaves at least eight steps per epoch where the data allows it."""
    if count // 8 >= largest:
        return largest
    return max(2, min(largest, 1 << int(math.log2(max(2, count // 8)))))


def epochs_for(count: int, views: int, low: int, high: int) -> int:
    """Epochs in which about `views` images are seen."""
    return max(low, min(high, round(views / count)))


def section_yaml(section: str, images: Images, choice: Choice) -> str:
    """Write one section as commented YAML, "" where nothing was chosen for it."""
    if section == "data":
        values: Mapping[str, Any] = images.keys
    else:
        values = {key.partition(".")[2]: value for key, value in choice.keys.items() if key.startswith(section + ".")}
    reason = choice.reasons.get(section, ("", ""))[1]
    if section in choice.keys:
        return f"\n{section}: {write(choice.keys[section])}" + (f"  # {reason}\n" if reason else "\n")
    if not values:
        return ""
    lines = [f"\n{section}:" + (f"  # {reason}" if reason else "")]
    for key, value in values.items():
        comment = choice.comments.get(f"{section}.{key}")
        lines.append(f"  {key}: {write(value)}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"

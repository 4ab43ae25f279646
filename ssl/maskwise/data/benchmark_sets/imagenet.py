"""ImageNet as class folders, its 20 % subset, ImageNet indices of class names, and ReaL labels."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.datasets.folder import Folder
from maskwise.errors import UserError

TEST_NAMES = ("val", "validation", "test")
SMALL_PER_CLASS = 260  # "20 % of ImageNet": `--subset 260` of the released AttMask and SimPool commands


def matches(folder: Path) -> bool:
    """Return whether a folder has train and val with class folders."""
    return (folder / "train").is_dir() and any((folder / name).is_dir() for name in TEST_NAMES)


def read(folder, per_class: int | None = None, channels: int = 3) -> dict:
    """Read `train/<wnid>/*` and `val/<wnid>/*` -> {"train", "test"}; per_class=260 keeps the first files of each class.

    Raises UserError for a missing part, images without class folders, and classes with fewer than `per_class` images.
    """
    folder = Path(folder).expanduser()
    if not matches(folder):
        raise UserError(
            f"{folder} has no train and val folder; give the folder that has both, with one subfolder per class"
        )
    name = next(name for name in TEST_NAMES if (folder / name).is_dir())
    data = {
        "train": Folder(folder, split="train", per_class=per_class, channels=channels),
        "test": Folder(folder, split=name, channels=channels),
    }
    for part, images in data.items():
        if images.labels is None:
            raise UserError(f"{part}: {images.no_labels}")
    if per_class is not None:
        counts = torch.bincount(data["train"].labels, minlength=len(data["train"].classes))
        if int(counts.min()) < per_class:
            short = data["train"].classes[int(counts.argmin())]
            raise UserError(
                f"{folder}: class {short} has {int(counts.min())} images, "
                f"fewer than the requested {per_class} per class"
            )
    return data


@functools.cache
def synsets() -> tuple[str, ...]:
    """Return the 1000 WordNet ids of ImageNet-1k in standard order, from timm's list."""
    home = Path(importlib.util.find_spec("timm").origin).parent
    return tuple((home / "data" / "_info" / "imagenet_synsets.txt").read_text(encoding="ascii").split())


def indices(classes: Sequence[str] | None) -> Tensor | None:
    """Convert class names (WordNet ids or numbers 0..999) to ImageNet indices int64 [C]; None for other names."""
    if not classes:
        return None
    if all(name.isdecimal() and int(name) < 1000 for name in classes):
        return torch.tensor([int(name) for name in classes])
    index_of = {wnid: index for index, wnid in enumerate(synsets())}
    if not all(name in index_of for name in classes):
        return None
    return torch.tensor([index_of[name] for name in classes])


def real_labels(path, dataset) -> list[list[int]]:
    """Read the ReaL labels of validation images, matched by the number in each file name.

    path: real.json, 50,000 lists of indices (Beyer et al. 2020).
    Raises UserError for another kind of file and for file names without a number.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        sets = [[int(label) for label in labels] for labels in table]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"ReaL labels: cannot read {path} ({getattr(error, 'strerror', None) or error}); "
            "give real.json, a list of label lists"
        ) from None
    labels = []
    for i in range(len(dataset)):
        match = re.search(r"_(\d{8})\.\w+$", dataset.name(i))
        if match is None or not 1 <= int(match[1]) <= len(sets):
            raise UserError(
                f"ReaL labels: {dataset.name(i)} has no number from 1 to {len(sets)} in its name; "
                "keep the names ILSVRC2012_val_00000001.JPEG"
            )
        labels.append(sets[int(match[1]) - 1])
    return labels

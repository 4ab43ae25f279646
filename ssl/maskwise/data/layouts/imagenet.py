"""ImageNet as class folders, its 20 % subset, the sets that share its classes, and ReaL labels."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.datasets import Folder, shortened
from maskwise.functional.errors import UserError

TEST_NAMES = ("val", "validation", "test")
SMALL_PER_CLASS = 260  # "20 % of ImageNet": 260,000 images (pooling.md fact 48)


def holds(folder: Path) -> bool:
    """Whether a folder has train and val with class folders."""
    return (folder / "train").is_dir() and any((folder / name).is_dir() for name in TEST_NAMES)


def read(folder, per_class: int | None = None) -> dict:
    """`train/<wnid>/*`, `val/<wnid>/*` -> {"train", "test"}; per_class=260 keeps the first files of each training class.

    Raises UserError for a missing half, images without class folders, and classes with fewer than `per_class` images.
    """
    folder = Path(folder).expanduser()
    if not holds(folder):
        raise UserError(f"{folder} holds no train and val folder; give the folder that has both, with one subfolder per class")
    name = next(name for name in TEST_NAMES if (folder / name).is_dir())
    data = {"train": Folder(folder, split="train", per_class=per_class), "test": Folder(folder, split=name)}
    for part, found in data.items():
        if found.labels is None:
            raise UserError(f"{folder}: the {part} images are not in class folders; give one subfolder per class")
    if per_class is not None:
        counts = torch.bincount(data["train"].labels, minlength=len(data["train"].classes))
        if int(counts.min()) < per_class:
            short = data["train"].classes[int(counts.argmin())]
            raise UserError(f"{folder}: class {short} has {int(counts.min())} images, fewer than the {per_class} per class asked for")
    return data


@functools.cache
def synsets() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k in their standard order, from the list that timm carries."""
    home = Path(importlib.util.find_spec("timm").origin).parent
    return tuple((home / "data" / "_info" / "imagenet_synsets.txt").read_text(encoding="ascii").split())


def indices(classes: Sequence[str] | None) -> Tensor | None:
    """Standard ImageNet indices of class names that are WordNet ids or numbers 0..999 -> int64 [C]; None where they are neither."""
    if not classes:
        return None
    if all(name.isdecimal() and int(name) < 1000 for name in classes):
        return torch.tensor([int(name) for name in classes])
    place = {wnid: number for number, wnid in enumerate(synsets())}
    return torch.tensor([place[name] for name in classes]) if all(name in place for name in classes) else None


def columns(what: str, asked: Sequence[str], known: Sequence[str]) -> Tensor:
    """Where the classes of a test set stand among the classes of a classifier, by name or by ImageNet index -> int64 [len(asked)].

    Raises UserError for classes that the classifier does not know.
    """
    place = {name: number for number, name in enumerate(known)}
    if not all(name in place for name in asked):
        ours, theirs = indices(asked), indices(known)
        if ours is not None and theirs is not None:
            place = {int(index): number for number, index in enumerate(theirs)}
            asked = ours.tolist()
    unknown = [str(name) for name in asked if name not in place]
    if unknown:
        raise UserError(f"{what}: {len(unknown)} of its {len(asked)} classes are unknown to the classifier ({shortened(unknown, 3)}); name the class folders alike")
    return torch.tensor([place[name] for name in asked], dtype=torch.int64)


def real_labels(path, dataset) -> list[list[int]]:
    """ReaL label sets of validation images (JSON, 50,000 lists of standard indices), found by the number in each file name.

    Raises UserError for another kind of file and for names without a number.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        sets = [[int(label) for label in labels] for labels in table]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"ReaL labels: cannot read {path} ({getattr(error, 'strerror', None) or error}); give real.json, a list of label lists") from None
    found = []
    for i in range(len(dataset)):
        match = re.search(r"_(\d{8})\.\w+$", dataset.name(i))
        if match is None or not 1 <= int(match[1]) <= len(sets):
            raise UserError(f"ReaL labels: {dataset.name(i)} has no number from 1 to {len(sets)} in its name; keep the names ILSVRC2012_val_00000001.JPEG")
        found.append(sets[int(match[1]) - 1])
    return found

"""Backgrounds Challenge (IN-9): nine super-classes, with foregrounds and backgrounds separated and mixed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.benchmark_sets.listed_files import ListedFiles, find_root
from maskwise.data.datasets.files import join_names
from maskwise.data.datasets.folder_index import scan
from maskwise.errors import UserError
from maskwise.imaging.formats import endings

CLASSES = ("dog", "bird", "wheeled vehicle", "reptile", "carnivore", "insect", "musical instrument", "primate", "fish")
VARIANTS = ("original", "only_fg", "mixed_same", "mixed_rand", "mixed_next", "no_fg", "only_bg_b", "only_bg_t")

# ImageNet indices of each super-class, ends included: 370 of 1000 (Xiao et al. 2021, in_to_in9.json)
_MEMBERS = (
    "151-170 173-268",
    "7-24 87-100 127-146",
    "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 675 690 705 717 734 "
    "751 757 791 802-803 817 820 829 847 864 866-867 870 880",
    "33-68",
    "269-280 286-299 356-362 387-388",
    "300-326",
    "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 822 875 881 889",
    "365-384",
    "0-6 389-397",
)


def standard_map() -> Tensor:
    """Return the map from ImageNet index to super-class 0..8, or -1: int64 [1000]."""
    table = torch.full((1000,), -1, dtype=torch.int64)
    for label, members in enumerate(_MEMBERS):
        for part in members.split():
            first, _, last = part.partition("-")
            table[int(first) : int(last or first) + 1] = label
    return table


def read_map(path) -> Tensor:
    """Read `in_to_in9.json`, {"0": -1, "1": 8, ...} -> int64 [classes]. Raises UserError for another kind of file."""
    try:
        table = {int(index): int(label) for index, label in json.loads(Path(path).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"IN-9: cannot read the map {path} ({getattr(error, 'strerror', None) or error}); give in_to_in9.json"
        ) from None
    if sorted(table) != list(range(len(table))) or not all(-1 <= label < len(CLASSES) for label in table.values()):
        raise UserError(f"IN-9: {path} must give every index from 0 to {max(len(table), 1) - 1} a class from -1 to 8")
    return torch.tensor([table[index] for index in range(len(table))])


def matches(folder: Path) -> bool:
    """Return whether a folder, or its `bg_challenge`, has the original images by class."""
    return (find_root(folder, "bg_challenge") / "original" / "val").is_dir()


def read(folder, variants: tuple[str, ...] | None = None) -> dict[str, ListedFiles]:
    """Read `<variant>/val/<nn_class>/*` -> {variant: images with labels 0..8}; by default every variant present.

    `fg_mask` is not a variant. Raises UserError for a requested variant that is missing and for other class folders.
    """
    root = find_root(folder, "bg_challenge")
    present = [name for name in VARIANTS if (root / name / "val").is_dir()]
    wanted = list(variants or present)
    missing = [name for name in wanted if name not in present]
    if missing or "original" not in present:
        folders = join_names([f"{name}/val" for name in missing or ["original"]])
        raise UserError(f"IN-9: {root} lacks {folders}; it should have {', '.join(VARIANTS)}")
    return {name: _variant(root / name / "val") for name in wanted}


def _variant(root: Path) -> ListedFiles:
    folders = {entry.name: entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    numbers = {name: int(name[:2]) for name in folders if name[:2].isdecimal()}
    if sorted(numbers.values()) != list(range(len(CLASSES))) or len(numbers) != len(folders):
        raise UserError(
            f"IN-9: {root} has {join_names(sorted(folders), 3) or 'no folders'}; it should have nine, 00_dog to 08_fish"
        )
    files, labels = [], []
    for name, label in sorted(numbers.items(), key=lambda pair: pair[1]):
        members = [f"{name}/{file}" for file in scan(root / name, endings())[0]]
        files += members
        labels += [label] * len(members)
    return ListedFiles("IN-9", root, files, labels, CLASSES)

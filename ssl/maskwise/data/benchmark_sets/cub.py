"""Caltech-UCSD Birds 200: 11,788 images of 200 classes, one box per image."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwise.data.benchmark_sets.listed_files import BoxedFiles, find_root, parse_int, read_table, require_files
from maskwise.errors import UserError

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt")


def matches(folder: Path) -> bool:
    """Return whether a folder, or its CUB_200_2011, has the lists."""
    return (find_root(folder, "CUB_200_2011") / "image_class_labels.txt").is_file()


def read(folder, part: str = "retrieval") -> dict:
    """Read `CUB_200_2011/{images, *.txt}` -> {"test"}, or {"train", "test"} with part="split".

    "retrieval" has classes 101-200 only; "split" is the official split. `.boxes(i)` is float [1, 4] as x0, y0, x1, y1
    in pixels (the file gives x, y, width, height). Raises UserError for missing files.
    """
    root = require_files("CUB", find_root(folder, "CUB_200_2011"), "images", *LISTS)
    images, labels, split, boxes = (
        {words[0]: words[1] for words in read_table("CUB", root / name, 2)} for name in LISTS
    )
    tables = zip(LISTS[1:], (labels, split, boxes))
    mismatch = next((name for name, table in tables if table.keys() != images.keys()), None)
    if mismatch:
        raise UserError(f"CUB: {root / mismatch} and images.txt do not list the same images; unpack the dataset again")
    classes = {key: parse_int("CUB", root / LISTS[1], word) for key, word in labels.items()}
    if part == "retrieval":
        return {"test": _select(root, images, classes, boxes, [key for key in images if classes[key] > 100])}
    return {
        role: _select(root, images, classes, boxes, [key for key in images if split[key] == flag])
        for role, flag in (("train", "1"), ("test", "0"))
    }


def _select(root: Path, images: dict, classes: dict, boxes: dict, keys: list) -> BoxedFiles:
    sides = torch.tensor([[float(side) for side in boxes[key].split()] for key in keys]).reshape(-1, 1, 4)
    corners = torch.cat([sides[..., :2], sides[..., :2] + sides[..., 2:]], dim=2)
    return BoxedFiles(
        "CUB", root / "images", [images[key] for key in keys], [classes[key] - 1 for key in keys], boxes=list(corners)
    )

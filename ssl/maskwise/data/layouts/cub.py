"""Caltech-UCSD Birds 200: 11,788 images of 200 classes, with one box each."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwise.data.layouts.files import Boxed, below, need, number, rows
from maskwise.functional.errors import UserError

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt")


def holds(folder: Path) -> bool:
    """Whether a folder, or its CUB_200_2011, has the lists."""
    return (below(folder, "CUB_200_2011") / "image_class_labels.txt").is_file()


def read(folder, part: str = "retrieval") -> dict:
    """`CUB_200_2011/{images, *.txt}` -> {"test"} of classes 101-200 ("retrieval"), or {"train", "test"} by the official split ("split").

    `.boxes(i)` is float [1, 4] as x0, y0, x1, y1 in pixels (the file gives x, y, width, height). Raises UserError for what is missing.
    """
    root = need("CUB", below(folder, "CUB_200_2011"), "images", *LISTS)
    images, labels, split, boxes = ({words[0]: words[1] for words in rows("CUB", root / name, 2)} for name in LISTS)
    uneven = next((name for name, table in zip(LISTS[1:], (labels, split, boxes)) if table.keys() != images.keys()), None)
    if uneven:
        raise UserError(f"CUB: {root / uneven} and images.txt do not list the same images; unpack the dataset again")
    classes = {key: number("CUB", root / LISTS[1], word) for key, word in labels.items()}
    if part == "retrieval":
        return {"test": _some(root, images, classes, boxes, [key for key in images if classes[key] > 100])}
    chosen = {"train": "1", "test": "0"}
    return {role: _some(root, images, classes, boxes, [key for key in images if split[key] == mark]) for role, mark in chosen.items()}


def _some(root: Path, images: dict, classes: dict, boxes: dict, keys: list) -> Boxed:
    sides = torch.tensor([[float(side) for side in boxes[key].split()] for key in keys]).reshape(-1, 1, 4)
    corners = torch.cat([sides[..., :2], sides[..., :2] + sides[..., 2:]], dim=2)
    return Boxed("CUB", root / "images", [images[key] for key in keys], [classes[key] - 1 for key in keys], boxes=list(corners))

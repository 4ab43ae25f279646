"""Stanford Cars: 16,185 images of 196 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskwise.data.layouts.files import Files, below, need
from maskwise.data.layouts.matlab import read_mat
from maskwise.functional.errors import UserError

NAMES = ("cars", "cars196", "stanford_cars")


def holds(folder: Path) -> bool:
    """Whether a folder has the annotations of all images."""
    return (below(folder, *NAMES) / "cars_annos.mat").is_file()


def read(folder, part: str = "retrieval") -> dict:
    """`car_ims/*.jpg`, `cars_annos.mat` -> {"test"} of classes 99-196 ("retrieval"), or {"train", "test"} by the official split ("split").

    Raises UserError for what is missing.
    """
    root = need("Cars", below(folder, *NAMES), "cars_annos.mat", "car_ims")
    (table,) = read_mat(root / "cars_annos.mat", "Cars", "annotations")
    table = np.atleast_1d(table)
    if not table.dtype.names or not {"relative_im_path", "class", "test"} <= set(table.dtype.names):
        raise UserError(f"Cars: {root / 'cars_annos.mat'} has no fields relative_im_path, class and test; give the file as published")
    entries = [(str(path), int(label), int(held)) for path, label, held in zip(table["relative_im_path"], table["class"], table["test"])]
    if part == "retrieval":
        chosen = {"test": [(path, label) for path, label, _ in entries if label > 98]}
    else:
        chosen = {role: [(path, label) for path, label, held in entries if held == mark] for role, mark in (("train", 0), ("test", 1))}
    return {role: Files("Cars", root, [path for path, _ in some], [label - 1 for _, label in some]) for role, some in chosen.items()}

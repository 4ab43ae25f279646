"""Stanford Cars: 16,185 images of 196 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskwise.data.benchmark_sets.listed_files import ListedFiles, find_root, require_files
from maskwise.data.benchmark_sets.matlab import read_mat
from maskwise.errors import UserError

NAMES = ("cars", "cars196", "stanford_cars")


def matches(folder: Path) -> bool:
    """Return whether a folder has the annotations of all images."""
    return (find_root(folder, *NAMES) / "cars_annos.mat").is_file()


def read(folder, part: str = "retrieval") -> dict:
    """Read `car_ims/*.jpg` and `cars_annos.mat` -> {"test"}, or {"train", "test"} with part="split".

    "retrieval" has classes 99-196 only; "split" is the official split. Raises UserError for missing files.
    """
    root = require_files("Cars", find_root(folder, *NAMES), "cars_annos.mat", "car_ims")
    (table,) = read_mat(root / "cars_annos.mat", "Cars", "annotations")
    table = np.atleast_1d(table)
    if not table.dtype.names or not {"relative_im_path", "class", "test"} <= set(table.dtype.names):
        raise UserError(
            f"Cars: {root / 'cars_annos.mat'} has no fields relative_im_path, class and test; "
            "give the file as published"
        )
    columns = (table["relative_im_path"], table["class"], table["test"])
    images = [(str(path), int(label), int(is_test)) for path, label, is_test in zip(*columns)]
    if part == "retrieval":
        parts = {"test": [image for image in images if image[1] > 98]}
    else:
        parts = {role: [image for image in images if image[2] == flag] for role, flag in (("train", 0), ("test", 1))}
    return {
        role: ListedFiles("Cars", root, [path for path, *_ in chosen], [label - 1 for _, label, _ in chosen])
        for role, chosen in parts.items()
    }

"""Oxford Flowers 102: 8,189 images, labels and splits in MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskwise.data.benchmark_sets.listed_files import ListedFiles, find_root, require_files
from maskwise.data.benchmark_sets.matlab import read_mat
from maskwise.errors import UserError

NAMES = ("flowers-102", "flowers102", "flowers")


def matches(folder: Path) -> bool:
    """Return whether a folder has the splits."""
    return (find_root(folder, *NAMES) / "setid.mat").is_file()


def read(folder) -> dict:
    """Read `jpg/image_%05d.jpg`, `imagelabels.mat` and `setid.mat` -> {"train", "test"} in file order, labels from 0.

    Training and validation images form one training set, as in published fine-tuning tables. Raises UserError for
    missing files.
    """
    root = require_files("Flowers", find_root(folder, *NAMES), "jpg", "imagelabels.mat", "setid.mat")
    (labels,) = read_mat(root / "imagelabels.mat", "Flowers", "labels")
    train, valid, test = (
        np.atleast_1d(part).astype(int) for part in read_mat(root / "setid.mat", "Flowers", "trnid", "valid", "tstid")
    )
    labels = np.atleast_1d(labels).astype(int)
    data = {}
    for role, ids in (("train", np.sort(np.concatenate([train, valid]))), ("test", np.sort(test))):
        if ids.min() < 1 or ids.max() > len(labels):
            raise UserError(
                f"Flowers: {root / 'setid.mat'} names images outside the {len(labels)} of imagelabels.mat; "
                "give the files as published"
            )
        data[role] = ListedFiles("Flowers", root, [f"jpg/image_{i:05d}.jpg" for i in ids], labels[ids - 1] - 1)
    return data

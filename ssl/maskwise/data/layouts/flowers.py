"""Oxford Flowers 102: 8,189 images, labels and splits in MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskwise.data.layouts.files import Files, below, need
from maskwise.data.layouts.matlab import read_mat
from maskwise.functional.errors import UserError

NAMES = ("flowers-102", "flowers102", "flowers")


def holds(folder: Path) -> bool:
    """Whether a folder has the splits."""
    return (below(folder, *NAMES) / "setid.mat").is_file()


def read(folder) -> dict:
    """`jpg/image_%05d.jpg`, `imagelabels.mat`, `setid.mat` -> {"train": trnid + valid, "test": tstid}, in file order, labels from 0.

    Training and validation images are one set, as the fine-tuning tables have it. Raises UserError for what is missing.
    """
    root = need("Flowers", below(folder, *NAMES), "jpg", "imagelabels.mat", "setid.mat")
    (labels,) = read_mat(root / "imagelabels.mat", "Flowers", "labels")
    train, valid, test = (np.atleast_1d(part).astype(int) for part in read_mat(root / "setid.mat", "Flowers", "trnid", "valid", "tstid"))
    labels = np.atleast_1d(labels).astype(int)
    found = {}
    for role, ids in (("train", np.sort(np.concatenate([train, valid]))), ("test", np.sort(test))):
        if ids.min() < 1 or ids.max() > len(labels):
            raise UserError(f"Flowers: {root / 'setid.mat'} names images outside the {len(labels)} of imagelabels.mat; give the files as published")
        found[role] = Files("Flowers", root, [f"jpg/image_{i:05d}.jpg" for i in ids], labels[ids - 1] - 1)
    return found

"""CIFAR-10 and CIFAR-100 as the published Python pickles."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.benchmark_sets.listed_files import find_root, require_files
from maskwise.data.benchmark_sets.safe_pickle import read_pickle
from maskwise.errors import UserError

TEN, HUNDRED = "cifar-10-batches-py", "cifar-100-python"


class InMemoryImages:
    """Images uint8 [n, 3, 32, 32] in memory, with labels."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: list[str] | None, title: str):
        self.pixels, self.labels = pixels, labels
        self.classes, self.title = classes, title

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 [3, 32, 32]."""
        return self.pixels[index]

    def name(self, index: int) -> str:
        """Return the name of one image: part and index."""
        return f"{self.title}/{index:05d}"

    def fingerprint(self) -> str:
        """Return a hex digest of the pixels."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()


def matches(folder: Path) -> bool:
    """Return whether a folder is, or has, one of the two."""
    root = _root(folder)
    return (root / "test_batch").is_file() or all((root / name).is_file() for name in ("train", "test"))


def read(folder) -> dict:
    """Read `cifar-10-batches-py/{data_batch_1..5,test_batch}` or `cifar-100-python/{train,test}` -> {"train", "test"}.

    CIFAR-100 has its fine labels. The pickles are read as plain data only. Raises UserError for missing or other files.
    """
    root = _root(folder)
    if (root / "test_batch").is_file():
        parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        key, names, meta = "labels", "label_names", "batches.meta"
    else:
        parts = {"train": ["train"], "test": ["test"]}
        key, names, meta = "fine_labels", "fine_label_names", "meta"
    require_files("CIFAR", root, *(file for files in parts.values() for file in files))
    classes = read_pickle(root / meta, "CIFAR").get(names) if (root / meta).is_file() else None
    return {role: _joined(root, files, key, classes, role) for role, files in parts.items()}


def _root(folder) -> Path:
    return find_root(folder, TEN, HUNDRED)


def _joined(root: Path, files: list[str], key: str, classes, role: str) -> InMemoryImages:
    pixels, labels = [], []
    for file in files:
        table = read_pickle(root / file, "CIFAR")
        rows = table.get("data") if isinstance(table, dict) else None
        valid = isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == 3072
        if not valid or len(table.get(key, ())) != len(rows):
            raise UserError(
                f"CIFAR: {root / file} has no rows of 3072 bytes with as many {key}; give the file as published"
            )
        pixels.append(torch.from_numpy(rows.copy()).reshape(-1, 3, 32, 32))
        labels.append(torch.tensor([int(label) for label in table[key]]))
    names = None if classes is None else [str(name) for name in classes]
    return InMemoryImages(torch.cat(pixels), torch.cat(labels), names, role)

"""CIFAR-10 and CIFAR-100 as the Python pickles that are published."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.layouts.files import below, need
from maskwise.data.layouts.pickles import read_pickle
from maskwise.functional.errors import UserError

TEN, HUNDRED = "cifar-10-batches-py", "cifar-100-python"


class Pixels:
    """Images held in memory: uint8 [n, 3, 32, 32] with labels."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: list[str] | None, title: str):
        self.pixels, self.labels, self.classes, self.title = pixels, labels, classes, title

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        """uint8 [3, 32, 32] of one image."""
        return self.pixels[index]

    def name(self, index: int) -> str:
        """Name of one image: its part and place."""
        return f"{self.title}/{index:05d}"

    def fingerprint(self) -> str:
        """Hex digest of the pixels."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()


def holds(folder: Path) -> bool:
    """Whether a folder is, or holds, one of the two."""
    root = _root(folder)
    return (root / "test_batch").is_file() or all((root / name).is_file() for name in ("train", "test"))


def read(folder) -> dict:
    """`cifar-10-batches-py/{data_batch_1..5,test_batch}` or `cifar-100-python/{train,test}` (fine labels) -> {"train", "test"}.

    The pickles are read as plain data only. Raises UserError for what is missing or is no CIFAR.
    """
    root = _root(folder)
    if (root / "test_batch").is_file():
        parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        key, names, meta = "labels", "label_names", "batches.meta"
    else:
        parts, key, names, meta = {"train": ["train"], "test": ["test"]}, "fine_labels", "fine_label_names", "meta"
    need("CIFAR", root, *(file for files in parts.values() for file in files))
    classes = read_pickle(root / meta, "CIFAR").get(names) if (root / meta).is_file() else None
    return {role: _joined(root, files, key, classes, role) for role, files in parts.items()}


def _root(folder) -> Path:
    return below(folder, TEN, HUNDRED)


def _joined(root: Path, files: list[str], key: str, classes, role: str) -> Pixels:
    pixels, labels = [], []
    for file in files:
        table = read_pickle(root / file, "CIFAR")
        rows = table.get("data") if isinstance(table, dict) else None
        good = isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == 3072
        if not good or len(table.get(key, ())) != len(rows):
            raise UserError(f"CIFAR: {root / file} holds no rows of 3072 bytes with as many {key}; give the file as published")
        pixels.append(torch.from_numpy(rows.copy()).reshape(-1, 3, 32, 32))
        labels.append(torch.tensor([int(label) for label in table[key]]))
    return Pixels(torch.cat(pixels), torch.cat(labels), None if classes is None else [str(name) for name in classes], role)

"""Subsets of a dataset."""

import hashlib
from functools import partial

import torch
from torch import Tensor

from maskwise.data.datasets.contents import contents, numbers_digest

BY_INDEX = (
    "source",
    "item",
    "stored_range",
    "mask",
    "box",
    "boxes",
    "box_size",
    "hard",
    "label_map",
    "image_id",
)  # methods of some
# attributes of some datasets
SETTINGS = ("channels", "bits", "max_pixels", "value_range", "root", "no_labels", "inclusive")
SETTINGS += ("class_count", "class_names", "file")


class Subset:
    """Select the images `rows` (int64 [m] or ints, in that order) of a dataset, with labels, masks and boxes.

    Raises IndexError for a row outside the dataset.
    """

    def __init__(self, dataset, rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(dataset):
            raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of a dataset of {len(dataset)}")
        self.dataset, self.rows = dataset, rows.tolist()
        self.labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[rows]
        self.classes = getattr(dataset, "classes", None)

    def __getattr__(self, name: str):
        if name in BY_INDEX:
            return partial(self._of_row, getattr(self.dataset, name))
        if name in SETTINGS:
            return getattr(self.dataset, name)
        raise AttributeError(name)

    def _of_row(self, method, index: int):
        return method(self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)

    def expect(self, indices) -> None:
        """Start reading images that are wanted next, where the dataset does that."""
        if hasattr(self.dataset, "expect"):
            self.dataset.expect([self.rows[index] for index in indices])

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 [3, H, W]."""
        return self.dataset.image(self.rows[index])

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.dataset.name(self.rows[index])

    def contents(self) -> dict[str, str]:
        """Return the digests of the whole dataset, and one of the selected rows."""
        return {**contents(self.dataset), "count": len(self), "rows": numbers_digest(self.rows)}

    def fingerprint(self) -> str:
        """Return a hex digest of the whole dataset and the selected rows."""
        return self._with_rows(self.dataset.fingerprint())

    def stamp(self) -> str:
        """Return a digest like `fingerprint` that includes modification times."""
        return self._with_rows(getattr(self.dataset, "stamp", self.dataset.fingerprint)())

    def _with_rows(self, digest: str) -> str:
        return hashlib.sha256(f"{digest} {self.rows}".encode()).hexdigest()


def subsample_evenly(dataset, count: int):
    """Take at most `count` evenly spaced images, which preserves the shares of sorted classes."""
    return dataset if count >= len(dataset) else Subset(dataset, torch.arange(count) * len(dataset) // count)

"""Some images of a dataset, as a dataset."""

import hashlib

import torch
from torch import Tensor


class Subset:
    """The images `rows` (int64 [m] or ints, in that order) of a dataset, with their labels; what it knows more of an image stays known.

    Raises IndexError for a row that the dataset lacks.
    """

    def __init__(self, dataset, rows):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(dataset):
            raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of a dataset of {len(dataset)}")
        self.dataset, self.rows = dataset, rows.tolist()
        self.labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[rows]
        self.classes = getattr(dataset, "classes", None)
        for known in ("mask", "box", "boxes"):
            if hasattr(dataset, known):
                setattr(self, known, lambda i, ask=getattr(dataset, known): ask(self.rows[i]))

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        """uint8 [3, H, W] of one image."""
        return self.dataset.image(self.rows[index])

    def name(self, index: int) -> str:
        """Name of one image."""
        return self.dataset.name(self.rows[index])

    def fingerprint(self) -> str:
        """Hex digest of the whole set and of the rows taken."""
        return self._with_rows(self.dataset.fingerprint())

    def stamp(self) -> str:
        """As `fingerprint`, with what the files' dates tell."""
        return self._with_rows(getattr(self.dataset, "stamp", self.dataset.fingerprint)())

    def _with_rows(self, whole: str) -> str:
        return hashlib.sha256(f"{whole} {self.rows}".encode()).hexdigest()


def evenly(dataset, count: int):
    """At most `count` images, evenly spread over the dataset's order, so that sorted classes keep their share; the set itself if it is no larger."""
    return dataset if count >= len(dataset) else Subset(dataset, torch.arange(count) * len(dataset) // count)

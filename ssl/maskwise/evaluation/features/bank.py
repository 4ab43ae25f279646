"""`FeatureBank`: the features of a dataset."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass
class FeatureBank:
    """Features of a dataset in its order, on the CPU, without images that could not be read.

    rows: name -> [n, ...], also `bank[name]`; labels int64 [n] or None; index int64 [n]: position of each row in the
    dataset; hash of images and labels; seconds; corrupt: name -> reason; device; origin: feature -> "computed",
    "cached", "resumed" or "damaged, computed again".
    """

    rows: dict[str, Tensor]
    labels: Tensor | None
    index: Tensor
    hash: str
    seconds: float
    corrupt: dict[str, str]
    device: str = "cpu"
    origin: dict[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    @property
    def pooled(self) -> Tensor:
        """Pooled vectors [n, D]."""
        return self.rows["pooled"]

    @property
    def patch_mean(self) -> Tensor | None:
        """Mean patch tokens [n, D], None if not extracted."""
        return self.rows.get("patch_mean")

    def cost(self) -> dict:
        """Return the cost entry of a report."""
        return {
            "seconds": round(self.seconds, 3),
            "images": len(self),
            "images_per_second": round(len(self) / max(self.seconds, 1e-9), 1),
            "device": self.device,
            "features": dict(self.origin),
        }

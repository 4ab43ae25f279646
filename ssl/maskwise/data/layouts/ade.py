"""ADE20K scene parsing: images and label maps of 150 classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.layouts.files import Stored, below, need
from maskwise.functional.picture import opened
from maskwise.functional.errors import UserError

IGNORED = 255  # what label 0, "other", becomes


class Scenes(Stored):
    """Images whose `.label_map(i)` is int64 [H, W] of classes 0..149, 255 where unlabelled."""

    def label_map(self, index: int) -> Tensor:
        """int64 [H, W] of classes."""
        with opened(self.maps[index]) as picture:
            ids = torch.from_numpy(np.array(picture).astype(np.int64))
        return torch.where(ids == 0, IGNORED, ids - 1)


def holds(folder: Path) -> bool:
    """Whether a folder, or its ADEChallengeData2016, has label maps."""
    return (below(folder, "ADEChallengeData2016") / "annotations" / "validation").is_dir()


def read(folder) -> dict:
    """`{images,annotations}/{training,validation}/ADE_*.{jpg,png}` -> {"train", "test"}. Raises UserError for what is missing."""
    root = need(
        "ADE20K", below(folder, "ADEChallengeData2016"), "images/training", "images/validation", "annotations/training", "annotations/validation"
    )
    found = {}
    for role, part in (("train", "training"), ("test", "validation")):
        names = sorted(file.name for file in (root / "images" / part).glob("*.jpg"))
        data = Scenes("ADE20K", root / "images" / part, names)
        data.maps = [root / "annotations" / part / f"{Path(name).stem}.png" for name in names]
        gone = [path for path in data.maps if not path.is_file()]
        if gone:
            raise UserError(f"ADE20K: {len(gone)} of {len(names)} label maps are missing, first {gone[0]}; unpack the whole dataset")
        found[role] = data
    return found

"""DAVIS 2017: frames of sequences and their masks, palette images of object ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.layouts.files import Stored, below, need, rows
from maskwise.functional.errors import UserError
from maskwise.functional.picture import opened


@dataclasses.dataclass
class Sequence:
    """One video: its frames in order, and `mask(i)`, int64 [H, W] object ids of a frame (0: background, 255 of a binary mask: 1)."""

    name: str
    frames: Stored
    masks: list[Path]

    def mask(self, index: int) -> Tensor:
        """int64 [H, W] of object ids."""
        with opened(self.masks[index]) as picture:
            ids = np.array(picture)
        ids = ids[..., 0] if ids.ndim == 3 else ids
        return torch.from_numpy(np.where(ids == 255, 1, ids).astype(np.int64))


def holds(folder: Path) -> bool:
    """Whether a folder, or its DAVIS, has frames at 480p."""
    return (below(folder, "DAVIS") / "JPEGImages" / "480p").is_dir()


def read(folder, year: str | None = None, part: str = "val") -> dict:
    """`JPEGImages/480p/<seq>`, `Annotations/480p/<seq>`, `ImageSets/<year>/val.txt` -> {"test": [Sequence, ...]}; year: 2017, else 2016.

    Every frame needs its mask. Raises UserError for what is missing.
    """
    root = need("DAVIS", below(folder, "DAVIS"), "JPEGImages/480p", "Annotations/480p", "ImageSets")
    years = [year] if year else ["2017", "2016"]
    lists = [root / "ImageSets" / each / f"{part}.txt" for each in years if (root / "ImageSets" / each / f"{part}.txt").is_file()]
    if not lists:
        raise UserError(f"DAVIS: {root} lacks ImageSets/{years[0]}/{part}.txt; give the folder as published")
    names = list(dict.fromkeys(_sequence(words[0]) for words in rows("DAVIS", lists[0], 1)))
    return {"test": [_read(root, name) for name in names]}


def _sequence(entry: str) -> str:
    """The 2016 lists name frames, the 2017 ones sequences."""
    return Path(entry).parent.name if Path(entry).suffix else entry


def _read(root: Path, name: str) -> Sequence:
    place = root / "JPEGImages" / "480p" / name
    frames = sorted(file.name for file in place.glob("*.jpg")) if place.is_dir() else []
    if not frames:
        raise UserError(f"DAVIS: {place} has no frames; unpack the whole dataset")
    masks = [root / "Annotations" / "480p" / name / f"{Path(frame).stem}.png" for frame in frames]
    gone = [mask for mask in masks if not mask.is_file()]
    if gone:
        raise UserError(f"DAVIS: {len(gone)} of {len(masks)} masks of {name} are missing, first {gone[0]}; unpack the whole dataset")
    return Sequence(name, Stored("DAVIS", place, frames), masks)

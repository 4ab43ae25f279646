"""DAVIS 2017: video frames, and masks as palette images of object ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.benchmark_sets.listed_files import UnrotatedFiles, find_root, read_table, require_files
from maskwise.errors import UserError
from maskwise.imaging.pil import opened


@dataclasses.dataclass
class Sequence:
    """The frames of one video and `mask(i)`, int64 [H, W] object ids (0: background).

    255 is the object of a mask without other ids (DAVIS 2016), and background beside other ids (void pixels).
    """

    name: str
    frames: UnrotatedFiles
    masks: list[Path]

    def mask(self, index: int) -> Tensor:
        """Return the object ids of one frame, int64 [H, W]."""
        with opened(self.masks[index]) as picture:
            ids = np.array(picture)
        ids = ids[..., 0] if ids.ndim == 3 else ids
        single = not ((ids > 0) & (ids < 255)).any()
        return torch.from_numpy(np.where(ids == 255, int(single), ids).astype(np.int64))


def matches(folder: Path) -> bool:
    """Return whether a folder, or its DAVIS, has frames at 480p."""
    return (find_root(folder, "DAVIS") / "JPEGImages" / "480p").is_dir()


def read(folder, year: str | None = None, part: str = "val") -> dict:
    """Read frames, masks and the list of sequences -> {"test": [Sequence, ...]}.

    Layout: `JPEGImages/480p/<seq>`, `Annotations/480p/<seq>`, `ImageSets/<year>/val.txt`. year: 2017 by
    default, else 2016. Every frame needs its mask. Raises UserError for missing files.
    """
    root = require_files("DAVIS", find_root(folder, "DAVIS"), "JPEGImages/480p", "Annotations/480p", "ImageSets")
    years = [year] if year else ["2017", "2016"]
    lists = [root / "ImageSets" / name / f"{part}.txt" for name in years]
    lists = [path for path in lists if path.is_file()]
    if not lists:
        raise UserError(f"DAVIS: {root} lacks ImageSets/{years[0]}/{part}.txt; give the folder as published")
    names = list(dict.fromkeys(_sequence(words[0]) for words in read_table("DAVIS", lists[0], 1)))
    return {"test": [_read(root, name) for name in names]}


def _sequence(entry: str) -> str:
    """Return the sequence of a list entry: the 2016 lists name frames, the 2017 lists sequences."""
    return Path(entry).parent.name if Path(entry).suffix else entry


def _read(root: Path, name: str) -> Sequence:
    folder = root / "JPEGImages" / "480p" / name
    frames = sorted(file.name for file in folder.glob("*.jpg")) if folder.is_dir() else []
    if not frames:
        raise UserError(f"DAVIS: {folder} has no frames; unpack the whole dataset")
    masks = [root / "Annotations" / "480p" / name / f"{Path(frame).stem}.png" for frame in frames]
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise UserError(
            f"DAVIS: {len(missing)} of {len(masks)} masks of {name} are missing, first {missing[0]}; "
            "unpack the whole dataset"
        )
    return Sequence(name, UnrotatedFiles("DAVIS", folder, frames), masks)

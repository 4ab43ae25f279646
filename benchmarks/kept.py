"""Image folders that lie decoded in memory: a benchmark of training is to measure training."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from maskwise.data.datasets import Folder
from maskwise.functional.resample import resize_image, short_side


class Kept:
    """A folder of images, decoded once a process, with `side` shrunk so that their shorter side has that many pixels: data.name=benchmarks.kept:Kept."""

    def __init__(self, path, split: str | None = None, per_class: int | None = None, side: int | None = None):
        self.folder, self.side = Folder(path, split, per_class=per_class), side
        self.labels, self.classes = self.folder.labels, self.folder.classes
        self.images = held(str(Path(path).resolve()), split, per_class, side)

    def __len__(self) -> int:
        return len(self.folder)

    def image(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W]."""
        return self.images[index]

    def name(self, index: int) -> str:
        """The file's name in the folder."""
        return self.folder.name(index)

    def fingerprint(self) -> str:
        """Hex digest of the files and the size that they were brought to."""
        return f"{self.folder.fingerprint()}-{self.side}"


@functools.lru_cache(maxsize=8)
def held(path: str, split: str | None, per_class: int | None, side: int | None) -> list[torch.Tensor]:
    """Every image of a folder."""
    folder = Folder(path, split, per_class=per_class)
    images = (folder.image(index) for index in range(len(folder)))
    return [image if side is None else resize_image(image, short_side(tuple(image.shape[-2:]), side)) for image in images]

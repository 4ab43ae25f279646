"""Image folders decoded once and held in memory, so that an experiment measures training and not decoding."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from maskwise.data.datasets.folder import Folder
from maskwise.imaging.resize import resize_image, short_side


class DecodedFolder:
    """A folder of images, decoded once per process; `data.name=launch.reproduce.decoded_folder:DecodedFolder`.

    side: resize images so that their shorter side has this many pixels.
    """

    def __init__(self, path, split: str | None = None, per_class: int | None = None, side: int | None = None):
        self.folder, self.side = Folder(path, split, per_class=per_class), side
        self.labels, self.classes = self.folder.labels, self.folder.classes
        self.images = decoded_images(str(Path(path).resolve()), split, per_class, side)

    def __len__(self) -> int:
        return len(self.folder)

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 [3, H, W]."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Return the file name relative to the folder."""
        return self.folder.name(index)

    def fingerprint(self) -> str:
        """Return a digest of the files and the size."""
        return f"{self.folder.fingerprint()}-{self.side}"


@functools.lru_cache(maxsize=8)
def decoded_images(path: str, split: str | None, per_class: int | None, side: int | None) -> list[torch.Tensor]:
    """Decode and resize all images of a folder."""
    folder = Folder(path, split, per_class=per_class)
    images = (folder.image(index) for index in range(len(folder)))
    return [
        image if side is None else resize_image(image, short_side(tuple(image.shape[-2:]), side)) for image in images
    ]

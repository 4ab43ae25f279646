"""Images with label maps in a plain folder: images/ and labels/, PNG files of class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.benchmark_sets.listed_files import UnrotatedFiles, require_files
from maskwise.errors import UserError
from maskwise.imaging.formats import endings
from maskwise.imaging.pil import opened

IGNORED = 255  # label of unlabeled pixels


class LabelMaps(UnrotatedFiles):
    """Images with label maps: `.label_map(i)`, int64 [H, W] of classes from 0, 255 where unlabeled.

    maps: one 8-bit PNG per image; first: the label of class 0 (smaller labels are unlabeled); class_count: number of
    classes, None where only the maps tell; class_names: by class, or None.
    """

    def __init__(
        self,
        *listed,
        maps: Sequence[Path],
        first: int = 0,
        class_count: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__(*listed)
        self.maps, self.first, self.class_count = list(maps), first, class_count
        self.class_names = None if class_names is None else list(class_names)
        missing = [path for path in self.maps if not path.is_file()]
        if missing:
            raise UserError(
                f"{listed[0]}: {len(missing)} of {len(self.maps)} label maps are missing, first {missing[0]}; "
                "give one PNG file per image, with its name"
            )

    def label_map(self, index: int) -> Tensor:
        """Return the classes of one image, int64 [H, W]. Raises UserError for a file that is no label map."""
        path = self.maps[index]
        try:
            with opened(path) as picture:
                ids = torch.from_numpy(np.array(picture).astype(np.int64))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is not a readable label map ({error}); leave the image out") from None
        if ids.ndim != 2 or int(ids.max()) > IGNORED:
            raise UserError(f"{path} is not an 8-bit gray or indexed PNG; a label map holds one class number per pixel")
        return torch.where((ids < self.first) | (ids == IGNORED), IGNORED, ids - self.first)


def matches(folder: Path) -> bool:
    """Return whether a folder has images/ and labels/ with PNG files."""
    folder = Path(folder).expanduser()
    labels = folder / "labels"
    return (folder / "images").is_dir() and any(
        next(labels.glob(pattern), None) is not None for pattern in ("*.png", "*/*.png")
    )


def read(folder) -> dict:
    """Read `{images,labels}/{train,val}/` -> {"train", "test"}, or `{images,labels}/` without splits -> {"test"}.

    A label map has the name of its image and the ending .png. Splits are subfolders of images/ whose names begin with
    train, and with val or test. classes.txt, if there is one, has a class name per line, the first for label 0. Raises
    UserError for missing files.
    """
    root = require_files("segmentation", Path(folder).expanduser(), "images", "labels")
    names = None
    if (root / "classes.txt").is_file():
        names = [line.strip() for line in (root / "classes.txt").read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
    splits = sorted(entry.name for entry in (root / "images").iterdir() if entry.is_dir())
    data = {}
    for role, beginnings in (("train", ("train",)), ("test", ("val", "test"))):
        for beginning in beginnings:
            chosen = [name for name in splits if name.lower().startswith(beginning)]
            if chosen and role not in data:
                data[role] = _read(root, chosen[0], names)
    return data or {"test": _read(root, "", names)}


def _read(root: Path, split: str, names: Sequence[str] | None) -> LabelMaps:
    images, labels = root / "images" / split, root / "labels" / split
    known = endings()
    files = sorted(file.name for file in images.iterdir() if file.suffix.lower() in known and file.name[0] != ".")
    maps = [labels / f"{Path(file).stem}.png" for file in files]
    count = None if names is None else len(names)
    return LabelMaps("segmentation", images, files, maps=maps, class_count=count, class_names=names)

"""Pascal VOC: images with boxes in XML."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.benchmark_sets.listed_files import BoxedFiles, find_root, read_table, require_files
from maskwise.errors import UserError


class VocImages(BoxedFiles):
    """Images with boxes: `.hard(i)`, bool [n], tells which objects are truncated or difficult."""

    def __init__(self, *listed, boxes, hard: list[Tensor]):
        super().__init__(*listed, boxes=boxes)
        self._hard = hard

    def hard(self, index: int) -> Tensor:
        """Return which objects of one image are truncated or difficult, bool [n]."""
        return self._hard[index]


def matches(folder: Path) -> bool:
    """Return whether a folder is, or has, a VOCdevkit with a year."""
    return any(years(folder))


def read(folder, year: str | None = None, part: str = "trainval") -> dict:
    """Read `VOCdevkit/VOC20xx/{JPEGImages, Annotations, ImageSets/Main/<part>.txt}` -> {"test"} with `.boxes(i)`.

    Boxes are float [n, 4] as x0, y0, x1, y1 in pixels: the file counts from 1, ends included, so 1 is subtracted from
    the minima only. Truncated and difficult objects are included; `.hard(i)` marks them. Raises UserError for missing
    files.
    """
    root = next((path for path in years(folder) if year is None or path.name == f"VOC{year}"), None)
    if root is None:
        raise UserError(
            f"VOC: {folder} has no VOCdevkit/VOC{year or '2007'} with ImageSets/Main; "
            "give the folder that has VOCdevkit"
        )
    require_files("VOC", root, "JPEGImages", "Annotations", f"ImageSets/Main/{part}.txt")
    names = [words[0] for words in read_table("VOC", root / "ImageSets" / "Main" / f"{part}.txt", 1)]
    tables = [read_objects("VOC", root / "Annotations" / f"{name}.xml") for name in names]
    boxes = [corners - torch.tensor([1.0, 1.0, 0.0, 0.0]) for corners, _ in tables]
    files = [f"{name}.jpg" for name in names]
    return {"test": VocImages("VOC", root / "JPEGImages", files, boxes=boxes, hard=[hard for _, hard in tables])}


def read_objects(dataset: str, path: Path) -> tuple[Tensor, Tensor]:
    """Read the corners of one annotation, as written, float [n, 4], and which objects are hard, bool [n].

    Raises UserError for a missing or damaged file.
    """
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise ValueError("it defines entities")
        objects = list(xml.fromstring(content).iter("object"))
        sides = [
            [float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            for element in objects
        ]
        hard = [any(element.findtext(key) == "1" for key in ("truncated", "difficult")) for element in objects]
    except (OSError, TypeError, ValueError, xml.ParseError) as error:
        raise UserError(f"{dataset}: cannot read {path} ({error}); unpack the dataset again") from None
    return torch.tensor(sides).reshape(-1, 4), torch.tensor(hard, dtype=torch.bool)


def years(folder) -> list[Path]:
    """Return the folders VOC20xx of a VOCdevkit, in order."""
    root = find_root(folder, "VOCdevkit")
    candidates = [root, *sorted(root.glob("VOC20*"))] if root.is_dir() else []
    return [path for path in candidates if (path / "ImageSets" / "Main").is_dir()]

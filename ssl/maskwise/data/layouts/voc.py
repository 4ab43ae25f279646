"""Pascal VOC: images with boxes in XML."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.layouts.files import Boxed, below, need, rows
from maskwise.functional.errors import UserError


def holds(folder: Path) -> bool:
    """Whether a folder is, or holds, a VOCdevkit with a year."""
    return any(_years(folder))


def read(folder, year: str | None = None, part: str = "trainval") -> dict:
    """`VOCdevkit/VOC20xx/{JPEGImages, Annotations, ImageSets/Main/<part>.txt}` -> {"test"} with `.boxes(i)`, float [n, 4].

    Boxes are x0, y0, x1, y1 in pixels: the file counts from 1, ends included, so 1 is taken off the minima only. Objects marked
    difficult are kept. Raises UserError for what is missing.
    """
    years = _years(folder)
    root = next((place for place in years if year is None or place.name == f"VOC{year}"), None)
    if root is None:
        raise UserError(f"VOC: {folder} holds no VOCdevkit/VOC{year or '2007'} with ImageSets/Main; give the folder that has VOCdevkit")
    need("VOC", root, "JPEGImages", "Annotations", f"ImageSets/Main/{part}.txt")
    names = [words[0] for words in rows("VOC", root / "ImageSets" / "Main" / f"{part}.txt", 1)]
    table = [boxes(root / "Annotations" / f"{name}.xml") for name in names]
    return {"test": Boxed("VOC", root / "JPEGImages", [f"{name}.jpg" for name in names], boxes=table)}


def boxes(path: Path) -> Tensor:
    """All objects of one annotation -> float [n, 4]; raises UserError for a file that is missing or damaged."""
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise ValueError("it defines entities")
        sides = [[float(each.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")] for each in xml.fromstring(content).iter("object")]
    except (OSError, TypeError, ValueError, xml.ParseError) as error:
        raise UserError(f"VOC: cannot read {path} ({error}); unpack the dataset again") from None
    return torch.tensor(sides).reshape(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])


def _years(folder) -> list[Path]:
    root = below(folder, "VOCdevkit")
    places = [root, *sorted(root.glob("VOC20*"))] if root.is_dir() else []
    return [place for place in places if (place / "ImageSets" / "Main").is_dir()]

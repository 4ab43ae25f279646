"""COCO: images with boxes, one JSON file per split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from maskwise.data.benchmark_sets.listed_files import BoxedFiles, find_root, read_table, require_files
from maskwise.errors import UserError

YEARS = ("2017", "2014")


class CocoImages(BoxedFiles):
    """Images with boxes, COCO image ids and the annotation file."""

    def __init__(self, *listed, boxes, ids: list[int], file: Path):
        super().__init__(*listed, boxes=boxes)
        self.ids, self.file = ids, file

    def image_id(self, index: int) -> int:
        """Return COCO's id of one image."""
        return self.ids[index]


class CocoMasks(CocoImages):
    """Images with boxes and `.mask(i)`: the pixels on objects, bool [H, W], drawn from the polygons."""

    def __init__(self, *listed, sizes: list[tuple[int, int]], polygons: list[list[np.ndarray]], **about):
        super().__init__(*listed, **about)
        self.sizes, self.polygons = sizes, polygons

    def mask(self, index: int) -> Tensor:
        """Return the pixels of one image that lie on an object, bool [H, W]."""
        picture = Image.new("1", self.sizes[index])
        draw = ImageDraw.Draw(picture)
        for polygon in self.polygons[index]:
            draw.polygon(polygon.tolist(), fill=1)
        return torch.from_numpy(np.array(picture))


def matches(folder: Path) -> bool:
    """Return whether a folder has instance annotations."""
    return any((find_root(folder, "coco") / "annotations").glob("instances_*.json"))


def has_part(folder, part: str) -> bool:
    """Return whether a folder has the instances of a split, such as train2017."""
    return (find_root(folder, "coco") / "annotations" / f"instances_{part}.json").is_file()


def read(folder, part: str | None = None, names=None, *, masks: bool = False) -> dict:
    """Read `<part>/*.jpg` (or `images/<part>/*.jpg`) and `annotations/instances_<part>.json` -> {"test"}.

    part: by default val2017, else the first split found; names: a list file that selects and orders images (COCO20k).
    `.boxes(i)` are x0, y0, x1, y1 rounded to whole pixels, without crowds; `.ids` are COCO's. masks: also `.mask(i)`,
    from the polygons, if all objects have some. Raises UserError for missing files.
    """
    root = find_root(folder, "coco")
    splits = [f"{half}{year}" for year in YEARS for half in ("val", "train")]
    part = part or next(
        (split for split in splits if (root / "annotations" / f"instances_{split}.json").is_file()), "val2017"
    )
    require_files("COCO", root, f"annotations/instances_{part}.json")
    images = root / "images" / part if (root / "images" / part).is_dir() else root / part
    try:
        table = json.loads((root / "annotations" / f"instances_{part}.json").read_text(encoding="utf-8"))
        files = {int(entry["id"]): str(entry["file_name"]) for entry in table["images"]}
        sides: dict[int, list] = {key: [] for key in files}
        polygons: dict[int, list] = {key: [] for key in files}
        sizes = {
            int(entry["id"]): (int(entry.get("width", 0)), int(entry.get("height", 0))) for entry in table["images"]
        }
        for entry in table["annotations"]:
            if not entry.get("iscrowd"):
                x, y, width, height = entry["bbox"]
                sides[int(entry["image_id"])].append([round(x), round(y), round(x + width), round(y + height)])
                outlines = entry.get("segmentation") if masks else None
                masks = masks and isinstance(outlines, list) and len(outlines) > 0
                if masks:
                    polygons[int(entry["image_id"])] += [np.array(outline, dtype=np.float32) for outline in outlines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"COCO: cannot read annotations/instances_{part}.json ({type(error).__name__}: {error}); "
            "unpack the dataset again"
        ) from None
    ids = list(files)
    if names is not None:
        id_of = {Path(file).name: key for key, file in files.items()}
        wanted = [Path(words[0]).name for words in read_table("COCO", Path(names), 1)]
        unknown = next((name for name in wanted if name not in id_of), None)
        if unknown:
            raise UserError(
                f"COCO: {names} lists {unknown}, which is not in instances_{part}.json; choose the part it was made for"
            )
        ids = [id_of[name] for name in wanted]
    boxes = [torch.tensor(sides[key], dtype=torch.float32).reshape(-1, 4) for key in ids]
    listed = ("COCO", images, [files[key] for key in ids])
    about = {"boxes": boxes, "ids": ids, "file": root / "annotations" / f"instances_{part}.json"}
    if masks and all(min(sizes[key]) > 0 for key in ids):
        outlines = [polygons[key] for key in ids]
        return {"test": CocoMasks(*listed, **about, sizes=[sizes[key] for key in ids], polygons=outlines)}
    return {"test": CocoImages(*listed, **about)}

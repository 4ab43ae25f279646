"""COCO: images with boxes in one JSON file a split."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from maskwise.data.layouts.files import Boxed, below, need, rows
from maskwise.functional.errors import UserError

YEARS = ("2017", "2014")


def holds(folder: Path) -> bool:
    """Whether a folder has instance annotations."""
    return any((below(folder, "coco") / "annotations").glob("instances_*.json"))


def read(folder, part: str | None = None, names=None) -> dict:
    """`<part>/*.jpg` (or `images/<part>/*.jpg`) and `annotations/instances_<part>.json` -> {"test"} with `.boxes(i)` and `.ids`.

    part: by default val2017, else the first split found; names: a list file that picks and orders images (COCO20k). Boxes are
    x0, y0, x1, y1 rounded to whole pixels, crowds left out. Raises UserError for what is missing.
    """
    root = below(folder, "coco")
    splits = [f"{half}{year}" for year in YEARS for half in ("val", "train")]
    part = part or next((split for split in splits if (root / "annotations" / f"instances_{split}.json").is_file()), "val2017")
    need("COCO", root, f"annotations/instances_{part}.json")
    pictures = root / "images" / part if (root / "images" / part).is_dir() else root / part
    try:
        table = json.loads((root / "annotations" / f"instances_{part}.json").read_text(encoding="utf-8"))
        files = {int(entry["id"]): str(entry["file_name"]) for entry in table["images"]}
        sides: dict[int, list] = {key: [] for key in files}
        for entry in table["annotations"]:
            if not entry.get("iscrowd"):
                x, y, width, height = entry["bbox"]
                sides[int(entry["image_id"])].append([round(x), round(y), round(x + width), round(y + height)])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"COCO: cannot read annotations/instances_{part}.json ({type(error).__name__}: {error}); unpack the dataset again") from None
    ids = list(files)
    if names is not None:
        place = {Path(file).name: key for key, file in files.items()}
        wanted = [Path(words[0]).name for words in rows("COCO", Path(names), 1)]
        strange = next((name for name in wanted if name not in place), None)
        if strange:
            raise UserError(f"COCO: {names} lists {strange}, which instances_{part}.json does not know; choose the part it was made for")
        ids = [place[name] for name in wanted]
    table = [torch.tensor(sides[key], dtype=torch.float32).reshape(-1, 4) for key in ids]
    found = Boxed("COCO", pictures, [files[key] for key in ids], boxes=table)
    found.ids = ids
    return {"test": found}

"""Read the files of the `nasty` pack: `python -m launch.reproduce.nasty --packs FOLDER --json FILE`.

Counts what is read and refused against the pack's list (expectations.csv), and compares pixels with Pillow's own
rotation and conversion. Intended difference: the list accepts partial pixels that Pillow returns when asked again after
an error.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from launch.reproduce.packs import unpack
from maskwise.bench import record
from maskwise.data.datasets.list_file import ImageList
from maskwise.data.decoding import jpeg
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.reader import DecodedDataset

REFUSED = {"png_broken/broken_data_stream.png", "png_broken/truncated_end_chunk.png"}
DECODERS = [name for name in jpeg.NAMES if name != "auto"]


def listed(folder: Path, place: Path) -> tuple[ImageList, list[dict]]:
    """Return the dataset of the pack's files and the rows of its list, in one order; `place` takes a list of paths."""
    with open(folder / "expectations.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    path = place / "list.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path"], *([row["path"]] for row in rows)])
    return ImageList(path, root=str(folder)), rows


def readable(row: dict) -> bool:
    """Whether a file of the list should be read."""
    return row["convert_rgb"] == "ok" and row["path"] not in REFUSED


def as_seen(path: Path) -> np.ndarray:
    """Decode with Pillow's own rotation and conversion, wide values by hand -> [H, W, 3]."""
    with Image.open(path) as image:
        image.load()
        bits = {"tiff/12bit.cropped.tif": 12}.get(f"{path.parent.name}/{path.name}", 16)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            gray = np.asarray(image).astype(int) * 2 ** (16 - bits) // 256
            return np.stack([gray] * 3, -1)
        if image.mode == "F":
            return np.stack([np.asarray(image).round()] * 3, -1)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB")).astype(int)


def outcomes(data: ImageList, rows: list[dict], decoder: str) -> dict:
    """Return counts of one decoder, and the largest difference of a pixel."""
    reader, largest = DecodedDataset(data, decoder), 0
    counts = {"readable": 0, "refused": 0, "unexpected": 0}
    for index, row in enumerate(rows):
        try:
            image = reader.image(index)
        except CorruptImage:
            image = None
        counts["refused" if image is None else "readable"] += 1
        counts["unexpected"] += (image is not None) != readable(row)
        if image is not None:
            pixels = image.permute(1, 2, 0).numpy().astype(int)
            largest = max(largest, float(np.abs(pixels - as_seen(data.root / row["path"])).max()))
    return {**counts, "largest_difference": largest}


def main() -> None:
    """Count, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=Path, required=True, help="the folder of the .tar.xz packs")
    parser.add_argument("--json", metavar="FILE", required=True)
    given = parser.parse_args()
    about = record.describe()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        data, rows = listed(unpack(given.packs / "nasty.tar.xz", Path(place)), Path(place))
        reasons = {name: jpeg.unavailable_reason(name) for name in DECODERS}
        result = {
            "record": about,
            "files": len(rows),
            "refused_unlike_the_list": len(REFUSED),
            "decoders": {name: why or outcomes(data, rows, name) for name, why in reasons.items()},
        }
    record.write(given.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

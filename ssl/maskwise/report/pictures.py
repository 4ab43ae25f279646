"""Pictures of a run folder by kind and step, as JPEG of modest size."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

Item = TypeVar("Item")

MOST_FRAMES = 8  # pictures of one kind, spread over the run
WIDEST, TALLEST, QUALITY = 760, 1600, 78  # pixels, and quality of JPEG
DRAWN_HERE = {"curves"}  # pictures that the page draws itself


@dataclass(frozen=True)
class Frame:
    """A picture at a step (None: of the whole run) as JPEG, with its size in pixels."""

    step: int | None
    jpeg: bytes = field(repr=False)
    size: tuple[int, int]


def read_pictures(folder: Path, notes: list[str]) -> dict[str, list[Frame]]:
    """Return the pictures of a run by kind, at most MOST_FRAMES of each; adds a note on each that is damaged."""
    paths: dict[str, list[tuple[int | None, Path]]] = {}
    for path in sorted([*(folder / "pictures").glob("*.png"), *(folder / "reports").glob("*.png")]):
        match = re.fullmatch(r"(.+)_step_(\d+)(_\w+)?", path.stem)
        kind, step = (match[1] + (match[3] or ""), int(match[2])) if match else (path.stem, None)
        if kind not in DRAWN_HERE and not path.name.startswith("."):
            paths.setdefault(kind, []).append((step, path))
    frames = {}
    for kind, found in paths.items():
        readable = [read_frame(step, path, notes) for step, path in spread_evenly(found, MOST_FRAMES)]
        if any(readable):
            frames[kind] = [frame for frame in readable if frame is not None]
    return frames


def spread_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_frame(step: int | None, path: Path, notes: list[str]) -> Frame | None:
    """Return a picture as a JPEG of at most WIDEST x TALLEST pixels; None, with a note, where it is damaged."""
    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        notes.append(f"{path.parent.name}/{path.name} cannot be read")
        return None
    small.thumbnail((WIDEST, TALLEST), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return Frame(step, file.getvalue(), small.size)

"""Masks of object ids as indexed PNG images with the palette of DAVIS."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

# DAVIS 2017: 22 colors, the ids after them gray
COLORS = (
    (0, 0, 0),
    (128, 0, 0),
    (0, 128, 0),
    (128, 128, 0),
    (0, 0, 128),
    (128, 0, 128),
    (0, 128, 128),
    (128, 128, 128),
    (64, 0, 0),
    (191, 0, 0),
    (64, 128, 0),
    (191, 128, 0),
    (64, 0, 128),
    (191, 0, 128),
    (64, 128, 128),
    (191, 128, 128),
    (0, 64, 0),
    (128, 64, 0),
    (0, 191, 0),
    (128, 191, 0),
    (0, 64, 128),
    (128, 64, 128),
)
PALETTE = np.array([*COLORS, *((i, i, i) for i in range(len(COLORS), 256))], dtype=np.uint8)


def write_indexed_png(path: str | Path, ids: ArrayLike) -> None:
    """Save ids 0..255, [H, W], as an indexed PNG, replacing an earlier file at once; a missing folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    picture = Image.fromarray(np.ascontiguousarray(ids, dtype=np.uint8))
    picture.putpalette(PALETTE.tobytes())
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

"""Images with attention maps, masks, frames and titles; uint8 arrays [H, W, 3]."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (34, 34, 40), (255, 255, 255)
COLORMAP = "inferno"  # monotonic in luminance: readable in gray


def heat(values: ArrayLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """Color a map [h, w] from its minimum (dark) to its maximum (bright), enlarged to size (H, W) -> [H, W, 3]."""
    from matplotlib import colormaps

    values = np.asarray(values, dtype=float)
    finite = np.where(np.isfinite(values), values, np.nan)
    if not np.isfinite(finite).any():
        finite = np.zeros_like(finite)
    low, high = np.nanmin(finite), np.nanmax(finite)
    share = np.nan_to_num((finite - low) / (high - low)) if high > low else np.zeros_like(finite)
    colors = colormaps[COLORMAP](share, bytes=True)[..., :3]
    return colors if size is None else enlarge(colors, size)


def overlay_heat(image: ArrayLike, values: ArrayLike, alpha: float = 0.6) -> np.ndarray:
    """Blend a colored map [h, w] into an image [H, W, 3] -> [H, W, 3]."""
    image = np.asarray(image)
    return _bytes((1 - alpha) * image + alpha * heat(values, image.shape[:2]))


def overlay_mask(
    image: ArrayLike, mask: ArrayLike, color: Sequence[int] = (118, 118, 124), alpha: float = 0.92
) -> np.ndarray:
    """Cover the masked patches, bool [h, w], of an image [H, W, 3] -> [H, W, 3]."""
    image = np.asarray(image)
    cover = enlarge(np.asarray(mask, dtype=bool), image.shape[:2])[..., None]
    return _bytes(np.where(cover, (1 - alpha) * image + alpha * np.array(color), image))


def enlarge(picture: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """Resize [h, w] or [h, w, 3] to size (H, W) by nearest neighbor: a patch stays a block of one color."""
    picture = np.asarray(picture)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, picture.shape[:2]))
    return picture[rows][:, columns]


def framed(picture: ArrayLike, color: Sequence[int], width: int = 6) -> np.ndarray:
    """Draw a border on a picture [H, W, 3]; width in pixels at a side of 128, in proportion for other sizes."""
    picture = np.array(picture)
    width = max(1, round(width * min(picture.shape[:2]) / 128))
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        picture[edge] = color
    return picture


def sheet(
    rows: Sequence[Sequence[ArrayLike]],
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
    tile: int | None = None,
    gap: int = 4,
) -> np.ndarray:
    """Arrange rows of pictures [H, W, 3], a title above each column and a label below each row -> [H, W, 3].

    Every picture is resized to the aspect ratio of the first at a width of `tile` pixels; by default the largest side,
    but at least 96.
    """
    rows = [[np.asarray(picture) for picture in row] for row in rows]
    tile = tile or max([96, *(max(picture.shape[:2]) for row in rows for picture in row)])
    first = next((picture for row in rows for picture in row), np.empty((1, 1)))
    tall = max(1, round(tile * first.shape[0] / first.shape[1]))
    font = ImageFont.load_default(size=max(12, tile // 7))
    line = max(12, tile // 7) + 10
    top, bottom = (line if titles else 0), (line if labels else 0)
    columns = max((len(row) for row in rows), default=0)
    width, height = gap + columns * (tile + gap), gap + top + len(rows) * (tall + bottom + gap)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        center = gap + column * (tile + gap) + tile // 2
        draw.text((center, gap + top // 2 - 2), fitted(title, font, tile), fill=INK, font=font, anchor="mm")
    for index, row in enumerate(rows):
        y = gap + top + index * (tall + bottom + gap)
        for column, picture in enumerate(row):
            canvas.paste(Image.fromarray(enlarge(picture, (tall, tile))), (gap + column * (tile + gap), y))
        if index < len(labels):
            text = fitted(labels[index], font, width - 2 * gap)
            draw.text((gap, y + tall + bottom // 2), text, fill=INK, font=font, anchor="lm")
    return np.array(canvas)


def fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text until it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…" if text else ""


def write_png(path: str | Path, picture: ArrayLike) -> None:
    """Save a picture, uint8 [H, W, 3], as PNG, replacing an earlier file at once; a missing folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)

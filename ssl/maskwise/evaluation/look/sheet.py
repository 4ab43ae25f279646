"""The sheet of one image: boxes, attention, mass, similarity, components; every masking; every head and block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from maskwise.evaluation.look.maps import RATIOS, Maps
from maskwise.evaluation.look.page import TITLES
from maskwise.evaluation.suite.figure_sheets import SEGMENT
from maskwise.functional.attention import mass_mask
from maskwise.imaging import drawing
from maskwise.imaging.panels import Band, Panel

SIDE = 320  # pixels of the longer side of a panel's picture
WIDE = 8  # heads in a row


def bands_of(
    maps: Maps, colors: Tensor, *, ratio: float = 0.5, mass: float = 0.6, point: tuple[float, float] | None = None
) -> list[Band]:
    """Return the bands of one image's sheet.

    colors uint8 [N, 3] of its patches; ratio of the masks, rounded to a per cent; mass: the share of the attention
    that chosen patches hold; point (x, y), 0 to 1: the patch of the similarities, by default the middle.
    """
    image = picture(maps.image)
    scale = image.shape[1] / maps.image.shape[1]
    boxes = {name: tuple(value * scale for value in box) for name, box in maps.boxes.items()}
    patch = patch_at(point or (0.5, 0.5), maps.grid)
    height, width = maps.original
    first = [Panel(f"{width} x {height} pixels", image, boxes=boxes)]
    if maps.guide is not None:
        share = mass_mask(maps.guide[None], mass)[0]
        first.append(Panel(f"attention ({maps.layers[-1].title})", heat(image, maps.guide, maps.grid)))
        covered = drawing.overlay_mask(image, on_grid(share, maps.grid), SEGMENT, alpha=0.55)
        first.append(Panel(f"{100 * mass:.0f} % of it in {int(share.sum())} of {len(share)} patches", covered))
    cosines = maps.tokens @ maps.tokens[patch]
    first.append(
        Panel("similarity to the marked patch", heat(image, cosines, maps.grid), mark=cell(patch, maps, scale))
    )
    components = drawing.enlarge(colors.reshape(*maps.grid, 3).numpy(), image.shape[:2])
    first.append(Panel("principal components", components))
    masks = [
        Panel(TITLES[name], drawing.overlay_mask(image, on_grid(mask[round(ratio * (len(RATIOS) - 1))], maps.grid)))
        for name, mask in maps.masks.items()
    ]
    bands = [Band(maps.name, first, 5), Band(f"Masks at {100 * ratio:.0f} % of the patches", masks, 5)]
    several = next((layer for layer in reversed(maps.layers) if len(layer.heads) > 1), None)
    if several is not None:
        panels = [Panel(f"head {i + 1}", heat(image, head, maps.grid)) for i, head in enumerate(several.heads)]
        bands.append(Band(f"Heads, {several.title}", panels, columns_of(len(panels))))
    if len(maps.layers) > 1:
        panels = [Panel(layer.title, heat(image, layer.merged, maps.grid)) for layer in maps.layers]
        bands.append(Band("Blocks, heads merged", panels, columns_of(len(panels))))
    return bands


def columns_of(count: int) -> int:
    """Return the columns of `count` panels in rows of about equal length, WIDE at most."""
    return -(-count // -(-count // WIDE))


def picture(image: np.ndarray) -> np.ndarray:
    """Return an image with a longer side of SIDE pixels, uint8 [h, w, 3]."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def heat(image: np.ndarray, values: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Draw a map [N] over an image."""
    return drawing.overlay_heat(image, on_grid(values, grid), 0.75)


def on_grid(values: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Return values [N] as an array [h, w]."""
    return values.reshape(grid).numpy()


def patch_at(point: Sequence[float], grid: tuple[int, int]) -> int:
    """Return the number of the patch at a point (x, y) of shares of the image."""
    column, row = (min(count - 1, int(share * count)) for share, count in zip(point, reversed(grid)))
    return row * grid[1] + column


def cell(patch: int, maps: Maps, scale: float) -> tuple[float, float, float, float]:
    """Return the box of a patch in pixels of a picture that is `scale` times the image."""
    row, column = divmod(patch, maps.grid[1])
    height, width = (scale * side / count for side, count in zip(maps.image.shape[:2], maps.grid))
    return column * width, row * height, (column + 1) * width, (row + 1) * height

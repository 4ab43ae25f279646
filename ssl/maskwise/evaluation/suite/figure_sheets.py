"""Sheets in the manner of SimPool's figures C2 to C9: attention of several models, of every block, and its mass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.evaluation.features.extract import evaluating
from maskwise.evaluation.suite.attention_sheets import TILE, attention_map, normalized, visible
from maskwise.functional.attention import mass_mask, mean_heads
from maskwise.imaging import drawing
from maskwise.nn.encoder import pooling_name

SEGMENT = (214, 40, 40)  # color of the patches that hold the mass


def figure_sheet(
    models: Sequence[tuple[str, object]], images: Tensor, *, mass: float | None = None, blocks: bool = False
) -> np.ndarray:
    """Draw each image and each model's attention, in one map -> uint8 [H, W, 3], one row per image.

    models: pairs (name, encoder); images uint8 or uint16 [n, C, S, S]. mass: instead of the attention, the fewest
    patches that hold this share of it (fig. C3). blocks: first the class token's attention in every block of the first
    model (fig. C7). Columns are titled by pooling and gamma (figs. C5, C6), or by name if these are alike.
    Raises UserError for a model without attention, and for blocks without a class token.
    """
    columns: list[tuple[str, Tensor, tuple[int, int]]] = []
    if blocks:
        maps = block_attention(models[0][1], images)
        columns = [(f"block {i + 1}", *each) for i, each in enumerate(maps)]
    titles = [pooling_title(encoder) for _, encoder in models]
    alike = len(set(titles)) < len(titles)
    for (name, encoder), title in zip(models, titles):
        attention, grid = attention_map(encoder, images)
        if attention is None:
            raise UserError(f"{name} gives no attention to draw: leave it out")
        columns.append((name if alike else title, attention, grid))
    rows = []
    for i, image in enumerate(visible(images).permute(0, 2, 3, 1).cpu().numpy()):
        rows.append([image, *(overlay(image, attention[i], grid, mass) for _, attention, grid in columns)])
    return drawing.sheet(rows, ["image", *(title for title, _, _ in columns)], tile=TILE)


def overlay(image: np.ndarray, attention: Tensor, grid: tuple[int, int], mass: float | None) -> np.ndarray:
    """Draw one map [N] over an image [H, W, 3]."""
    if mass is None:
        return drawing.overlay_heat(image, attention.reshape(grid).numpy(), 0.75)
    chosen = mass_mask(attention[None], mass)[0].reshape(grid).numpy()
    return drawing.overlay_mask(image, chosen, SEGMENT, alpha=0.55)


def block_attention(encoder, images: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
    """Return the class token's attention of every block, averaged over heads, and the grid: ([n, N], (h, w)) each.

    Raises UserError for a network that is no transformer with a class token.
    """
    backbone = getattr(encoder, "backbone", None)
    if not getattr(backbone, "has_class_token", False) or not hasattr(backbone, "class_attention"):
        raise UserError(
            "blocks=true draws the class token's attention of every block, and this model has no class token: give one "
            "that has, and this one as beside"
        )
    inputs = normalized(encoder, images)
    with evaluating(encoder), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        rows = backbone.class_attention(inputs)
    grid = backbone.grid_for(tuple(inputs.shape[-2:]))
    return [(mean_heads(block).cpu(), grid) for block in rows.unbind(1)]


def pooling_title(encoder) -> str:
    """Return the title of a model's column: class token, pooling, or SimPool's gamma."""
    pooling = getattr(encoder, "pooling", None)
    name = "attention" if pooling is None else pooling_name(pooling)
    if name == "simpool":
        with torch.no_grad():
            gamma = pooling.current_gamma(torch.float32)
        return "no gamma" if gamma is None else f"gamma {float(gamma):g}"
    return "class token" if name == "cls" else name

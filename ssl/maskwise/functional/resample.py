"""Bicubic resampling of position tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32

POSITION_MODES = ("offset", "size", "offset_always")


def position_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], mode: str = "offset") -> Tensor:
    """Resample a position table to another grid by bicubic interpolation: [1, h*w, D] -> [1, h'*w', D], no prefix rows.

    "offset" scales by (n + 0.1) / old, as in the code of DINO and iBOT; "size" maps grid onto grid; both leave an equal
    grid untouched. "offset_always" resamples that too, as in the code of SimPool. Raises UserError for another mode.
    """
    if mode not in POSITION_MODES:
        raise UserError(f"unknown position mode {mode!r}; choose offset, size or offset_always")
    old_grid, new_grid = (old_grid[0], old_grid[1]), (new_grid[0], new_grid[1])
    if any(isinstance(side, torch.SymInt) for side in new_grid):
        return _traced_table(table, old_grid, new_grid, mode)
    if old_grid == new_grid and mode != "offset_always":
        return table
    if table.is_cuda and torch.are_deterministic_algorithms_enabled():
        # the gradient of F.interpolate accumulates in no fixed order there
        return _traced_table(table, old_grid, new_grid, mode)
    plane = table.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    plane = at_least_float32(plane)
    if mode == "size":
        plane = F.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    else:
        scale = tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid))
        plane = F.interpolate(
            plane, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False
        )
    return plane.flatten(2).transpose(1, 2).to(table.dtype)


def _traced_table(table: Tensor, old_grid: tuple[int, int], new_grid, mode: str) -> Tensor:
    """Resample for a grid unknown during tracing: the same bicubic weights as two matrices."""
    plane = table.reshape(*old_grid, -1)
    plane = at_least_float32(plane)
    cells = [torch.arange(side, device=plane.device, dtype=plane.dtype) for side in new_grid]
    counts = [cell[-1] + 1 for cell in cells]  # the sides as tensors: tracing fixes no branch
    equal = torch.logical_and(*(count == old for count, old in zip(counts, old_grid)))
    offset = torch.zeros_like(counts[0]) if mode == "size" else torch.full_like(counts[0], 0.1)
    offset = offset if mode == "offset_always" else torch.where(equal, 0.0, offset)
    rows, columns = (_bicubic(cell, (count + offset) / old, old) for cell, count, old in zip(cells, counts, old_grid))
    half = torch.einsum("hy,yxd->hxd", rows, plane)
    return torch.einsum("wx,hxd->hwd", columns, half).flatten(0, 1).unsqueeze(0).to(table.dtype)


def _bicubic(cells: Tensor, scale: Tensor, old: int) -> Tensor:
    """Bicubic weights [new, old] with a = -0.75, half-pixel centers and clamped borders, as in torch."""
    x = (cells + 0.5) / scale - 0.5
    floor = x.floor()
    weights = torch.zeros((), dtype=x.dtype, device=x.device)
    for tap in (-1, 0, 1, 2):
        distance = (x - floor - tap).abs()
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        index = (floor + tap).clamp(0, old - 1)
        hit = (index.unsqueeze(1) == torch.arange(old, device=x.device, dtype=x.dtype)).to(x.dtype)
        weights = weights + torch.where(distance <= 1, near, far).unsqueeze(1) * hit
    return weights

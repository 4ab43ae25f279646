"""Bicubic resampling of position tables and of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional.errors import UserError


def position_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], mode: str = "offset") -> Tensor:
    """Resample a position table to another grid: [1, h*w, D] -> [1, h'*w', D]; rows of prefix tokens are not part of it.

    "offset" scales by (n + .1) / old, as the DINO family was trained; "size" maps grid onto grid; both leave an
    equal grid untouched. "offset_always" resamples that too, as SimPool's released weights want. Raises UserError for
    another mode. attmask.md 1.1, A.5.
    """
    if mode not in ("offset", "size", "offset_always"):
        raise UserError(f"unknown position mode {mode!r}; choose offset, size or offset_always")
    old_grid, new_grid = tuple(old_grid), tuple(new_grid)
    if any(isinstance(side, torch.SymInt) for side in new_grid):
        return _traced_table(table, old_grid, new_grid, mode)
    if old_grid == new_grid and mode != "offset_always":
        return table
    if table.is_cuda and torch.are_deterministic_algorithms_enabled():  # the gradient of torch's own adds up in any order there
        return _traced_table(table, old_grid, new_grid, mode)
    plane = table.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    plane = plane if plane.dtype == torch.float64 else plane.float()
    if mode == "size":
        plane = F.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    else:
        scale = tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid))
        plane = F.interpolate(plane, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return plane.flatten(2).transpose(1, 2).to(table.dtype)


def _traced_table(table: Tensor, old_grid: tuple[int, int], new_grid, mode: str) -> Tensor:
    """`position_table` for a grid that is not known while a program is traced: the same bicubic weights as two matrices."""
    plane = table.reshape(*old_grid, -1)
    plane = plane if plane.dtype == torch.float64 else plane.float()
    cells = [torch.arange(side, device=plane.device, dtype=plane.dtype) for side in new_grid]
    counts = [each[-1] + 1 for each in cells]  # the sides as tensors, so that no branch is fixed by tracing
    equal = torch.logical_and(*(count == old for count, old in zip(counts, old_grid)))
    offset = torch.zeros_like(counts[0]) if mode == "size" else torch.full_like(counts[0], 0.1)
    offset = offset if mode == "offset_always" else torch.where(equal, 0.0, offset)
    rows, columns = (_bicubic(each, (count + offset) / old, old) for each, count, old in zip(cells, counts, old_grid))
    half = torch.einsum("hy,yxd->hxd", rows, plane)
    return torch.einsum("wx,hxd->hwd", columns, half).flatten(0, 1).unsqueeze(0).to(table.dtype)


def _bicubic(cells: Tensor, scale: Tensor, old: int) -> Tensor:
    """Weights [new, old] of bicubic interpolation with a = -0.75, half-pixel centres and clamped borders, as torch's."""
    x = (cells + 0.5) / scale - 0.5
    floor = x.floor()
    weights = 0.0
    for tap in (-1, 0, 1, 2):
        away = (x - floor - tap).abs()
        near = 1.25 * away**3 - 2.25 * away**2 + 1
        far = -0.75 * (away**3 - 5 * away**2 + 8 * away - 4)
        index = (floor + tap).clamp(0, old - 1)
        hit = (index.unsqueeze(1) == torch.arange(old, device=x.device, dtype=x.dtype)).to(x.dtype)
        weights = weights + torch.where(away <= 1, near, far).unsqueeze(1) * hit
    return weights


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with antialiased bicubic: uint8, uint16 or float [C, H, W] or [B, C, H, W], size (h, w) -> same type and layout."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    batch = image if image.ndim == 4 else image[None]
    if batch.dtype == torch.uint16 or batch.dtype == torch.uint8 and batch.device.type != "cpu":  # torch resizes neither
        kind = batch.dtype
        batch = F.interpolate(batch.float(), size=size, mode="bicubic", antialias=True).round_().clamp_(0, torch.iinfo(kind).max).to(kind)
    else:
        batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True)
    return batch if image.ndim == 4 else batch[0]


def short_side(size: tuple[int, int], target: int) -> tuple[int, int]:
    """The size (h, w) whose short side is `target` at the same aspect; the long side is truncated, as PIL users do."""
    height, width = size
    return (target, int(target * width / height)) if height <= width else (int(target * height / width), target)

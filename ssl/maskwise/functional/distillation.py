"""Distillation of features: cosine distances, tokens on another grid, inputs of another network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional.precision import at_least_float32, autocast_off


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos of each pair of vectors in at least float32: [..., D], [..., D] -> [...]; no teacher gradient."""
    with autocast_off(student):
        pair = at_least_float32(student), at_least_float32(teacher.detach())
        return 1 - F.cosine_similarity(*pair, dim=-1)


def resample_tokens(tokens: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample tokens [V, N, D] of a grid (h, w) bilinearly to another, [V, N', D]; an equal grid changes nothing.

    Corners are those of the outer cells (align_corners=False), so that half as many cells average two by two.
    """
    if tuple(grid) == tuple(new_grid):
        return tokens
    with autocast_off(tokens):
        plane = at_least_float32(tokens).transpose(1, 2).unflatten(2, tuple(grid))
        resampled = F.interpolate(plane, size=tuple(new_grid), mode="bilinear", align_corners=False)
    return resampled.flatten(2).transpose(1, 2).to(tokens.dtype)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over masked patches of each view, then over views: [V, N], bool [V, N] -> 0-dim.

    A view without masked patches counts 0, as in iBOT's patch loss.
    """
    per_view = (values * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
    return per_view.mean()


def renormalize(images: Tensor, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Tensor:
    """Return images [B, C, H, W] normalized by (mean, std) `old` as they are normalized by `new`."""
    if [tuple(values) for values in old] == [tuple(values) for values in new]:
        return images
    (mean, std), (new_mean, new_std) = (
        [torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1) for values in pair]
        for pair in (old, new)
    )
    return images * (std / new_std) + (mean - new_mean) / new_std

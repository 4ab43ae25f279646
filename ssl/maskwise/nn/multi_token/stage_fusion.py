"""Fusion of the maps of several stages into one (MAP, fig. 6d)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.multi_token.options import RESAMPLES, Resample


class MultiScale(nn.Module):
    """Resize maps [B, dims[s], H_s, W_s] to the grid of `level` and fuse them: [B, dim, H, W].

    Concatenation, 1x1 convolution, batch norm, GELU. A single map passes through convolution, batch norm and ReLU if
    its width is not `dim`, otherwise unchanged. resample="released": adaptive averaging enlarges maps, and bilinear
    interpolation without antialiasing shrinks them, as in the released code; "area": the reverse.
    Raises UserError for a level out of range.
    """

    def __init__(self, dims: Sequence[int], dim: int, level: int = 3, resample: Resample = "released"):
        super().__init__()
        if resample not in RESAMPLES:
            raise UserError(f"map: resample={resample!r} is unknown: choose released or area")
        if len(dims) > 1 and not -len(dims) <= level < len(dims):
            raise UserError(
                f"map: level={level} of {len(dims)} stages is out of range: "
                f"choose the stage whose grid the others take, from 0 to {len(dims) - 1}"
            )
        self.dims, self.dim, self.level, self.resample = tuple(dims), dim, level, resample
        if len(dims) > 1:
            self.join = nn.Sequential(nn.Conv2d(sum(dims), dim, 1, bias=False), nn.BatchNorm2d(dim), nn.GELU())
        elif dims[0] != dim:
            self.join = nn.Sequential(nn.Conv2d(dims[0], dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        else:
            self.join = nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse maps [B, dims[s], H_s, W_s] to [B, dim, H, W]."""
        if len(maps) == 1:
            return self.join(maps[0])
        size = tuple(maps[self.level].shape[-2:])
        return self.join(torch.cat([resize_map(stage, size, self.resample) for stage in maps], dim=1))


def resize_map(x: Tensor, size: tuple[int, int], resample: Resample) -> Tensor:
    """Resize a map [B, C, h, w] to `size`; see MultiScale."""
    if tuple(x.shape[-2:]) == size:
        return x
    enlarges = size[0] > x.shape[-2]
    if enlarges == (resample == "released"):
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

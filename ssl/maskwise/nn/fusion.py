"""The maps of several stages as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError


class MultiScale(nn.Module):
    """Maps of several stages [B, dims[s], H_s, W_s] -> one [B, dim, H, W] on the grid of the map at `level`: resized, joined, 1x1 convolution, batch norm, GELU.

    resample "released": smaller maps grow by adaptive averaging, larger ones shrink by bilinear interpolation without
    antialiasing, which is what the reference does and not what its names suggest; "area": the other way round.
    A single map goes through convolution, batch norm and ReLU where its width is not `dim`, else untouched.
    Raises UserError for a level that is not there. MAP fig. 6d, pooling.md 3.1.
    """

    def __init__(self, dims: Sequence[int], dim: int, level: int = 3, resample: str = "released"):
        super().__init__()
        if resample not in ("released", "area"):
            raise UserError(f"map: resample={resample!r} is unknown: choose released or area")
        if len(dims) > 1 and not -len(dims) <= level < len(dims):
            raise UserError(f"map: level={level} of {len(dims)} stages; choose from 0 to {len(dims) - 1}, the one whose grid the others take")
        self.dims, self.dim, self.level, self.resample = tuple(dims), dim, level, resample
        if len(dims) > 1:
            self.join = nn.Sequential(nn.Conv2d(sum(dims), dim, 1, bias=False), nn.BatchNorm2d(dim), nn.GELU())
        elif dims[0] != dim:
            self.join = nn.Sequential(nn.Conv2d(dims[0], dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        else:
            self.join = nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, dims[s], H_s, W_s] each -> [B, dim, H, W]."""
        if len(maps) == 1:
            return self.join(maps[0])
        size = tuple(maps[self.level].shape[-2:])
        return self.join(torch.cat([resized(each, size, self.resample) for each in maps], dim=1))


def resized(image: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """A map [B, C, h, w] brought to `size`; see MultiScale."""
    grows = size[0] > image.shape[-2]
    if tuple(image.shape[-2:]) == size:
        return image
    if grows == (resample == "released"):
        return F.adaptive_avg_pool2d(image, size)
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)

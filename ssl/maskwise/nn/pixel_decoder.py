"""Decoder from patch features to pixels, for MST."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelDecoder(nn.Module):
    """Patches [B, N, dim] over a grid (h, w) -> images [B, 3, h * ph, w * pw], for patches of (ph, pw) pixels.

    A 3x3 convolution over the grid, GELU, and a Linear to the pixels of each patch; any grid is accepted. Weights are
    initialized as in the projection head. MST publishes no decoder; this one is ours (docs/recipes.md).
    """

    def __init__(self, dim: int, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.neighbors = nn.Conv2d(dim, dim, 3, padding=1)
        self.pixels = nn.Linear(dim, 3 * self.patch_size[0] * self.patch_size[1])
        for layer in (self.neighbors, self.pixels):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, dim], (h, w) with h * w = N, row-major -> [B, 3, h * ph, w * pw]."""
        (h, w), (ph, pw) = grid, self.patch_size
        mixed = F.gelu(self.neighbors(patches.transpose(1, 2).unflatten(2, (h, w))))
        pixels = self.pixels(mixed.permute(0, 2, 3, 1)).unflatten(3, (3, ph, pw))
        return torch.einsum("bhwcpq->bchpwq", pixels).reshape(len(patches), 3, h * ph, w * pw)

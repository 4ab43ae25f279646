"""A small decoder from patch features back to pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelDecoder(nn.Module):
    """Patches [B, N, dim] over a grid (h, w) -> images [B, 3, h * ph, w * pw], for patches of (ph, pw) pixels.

    A 3x3 convolution over the grid, GELU, and one linear map to the pixels of each patch: neighbours help, and any grid
    passes. Weights start as the projection head's do (attmask.md 1.2). Ours; see docs/recipes.md on MST.
    """

    def __init__(self, dim: int, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.neighbours = nn.Conv2d(dim, dim, 3, padding=1)
        self.pixels = nn.Linear(dim, 3 * self.patch_size[0] * self.patch_size[1])
        for layer in (self.neighbours, self.pixels):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, dim], (h, w) with h * w = N, row-major -> [B, 3, h * ph, w * pw]."""
        (h, w), (ph, pw) = grid, self.patch_size
        mixed = F.gelu(self.neighbours(patches.transpose(1, 2).unflatten(2, (h, w))))
        pixels = self.pixels(mixed.permute(0, 2, 3, 1)).unflatten(3, (3, ph, pw))
        return torch.einsum("bhwcpq->bchpwq", pixels).reshape(len(patches), 3, h * ph, w * pw)

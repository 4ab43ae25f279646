"""Magnitudes of the discrete Fourier transform, which do not change when the map is shifted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.nn.pooling.base import Pooling, as_map, check_count, linear
from maskwise.nn.tokens import Pooled


class DFT(Pooling):
    """Magnitudes of each channel's lowest `size` x `size` frequencies, joined by a layer with ReLU (DFT).

    The first is that of the average. A cyclic shift of the map changes nothing. Four frequencies per axis are the
    different ones of a 7 x 7 map; on an axis with fewer patches than `size` they repeat. Weights: dim^2 size^2 + dim;
    with ResNet-50 and 1000 classes the network has the 92.7 M of MAP's table 1. Raises UserError for a size below 1.
    """

    def __init__(self, dim: int, size: Count = 4):
        super().__init__(dim)
        self.size = check_count("size", size)
        self.fc = nn.Linear(dim * size**2, dim)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """One hidden layer with ReLU on the magnitudes."""
        return Pooled(F.relu(linear(self.fc, low_magnitudes(as_map(x, grid), self.size).flatten(1))), None)


def low_magnitudes(maps: Tensor, size: int) -> Tensor:
    """Return |DFT| / (H W) at the frequencies (0 .. size - 1)^2 of maps [B, D, H, W], [B, D, size, size].

    Two products with cosines and sines instead of an FFT, which ONNX lacks.
    """
    (row_cos, row_sin), (column_cos, column_sin) = (waves(length, size, maps) for length in maps.shape[2:])
    cos, sin = torch.matmul(maps, column_cos.mT), torch.matmul(maps, column_sin.mT)  # [B, D, H, size]
    real = torch.matmul(row_cos, cos) - torch.matmul(row_sin, sin)
    imaginary = torch.matmul(row_cos, sin) + torch.matmul(row_sin, cos)
    squares = real.square() + imaginary.square()
    return squares.clamp_min(torch.finfo(maps.dtype).tiny).sqrt()  # a gradient of 0 at 0


def waves(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the average's weights of `size` frequencies, cosines and sines [size, length] / length."""
    positions = torch.arange(length, dtype=like.dtype, device=like.device)
    frequencies = torch.arange(size, dtype=like.dtype, device=like.device)
    angles = 2 * math.pi / length * (frequencies[:, None] * positions).remainder(length)
    return angles.cos() / length, angles.sin() / length

"""Tokens computed from the Gramian matrix of an image's channels, and learned tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.nn.batch_norm import batch_normed


class GramianTokens(nn.Module):
    """Compute tokens [B, tokens, dim] from the Gramian matrix of a map [B, dim, H, W] (Ryu et al. 2023).

    R = BN(conv1x1(map)) has `width` channels, by default dim. The upper triangle of R R^T, of length
    L = width (width + 1) / 2, is normalized to length 1, interleaved (entries 0, T, 2T, ... first) and mapped by a 1x1
    convolution in `groups` groups and a batch norm to dim * tokens channels; channel o * tokens + t is coordinate o of
    token t. The matrix and its norm are in float32 or float64 with autocast off: entries span too many magnitudes for
    half precision. groups None: the largest common divisor up to 32.
    Raises UserError for `tokens` or `groups` that do not divide.
    """

    def __init__(self, dim: int, tokens: int, width: int | None = None, groups: int | None = None):
        super().__init__()
        width = width or dim
        length = width * (width + 1) // 2
        if length % tokens:
            raise UserError(
                f"map: {tokens} tokens do not divide the {length} entries of a Gramian matrix {width} wide; "
                "choose another gram_width"
            )
        common = math.gcd(length, dim * tokens)
        groups = groups or max(g for g in range(1, 33) if common % g == 0)
        if common % groups:
            raise UserError(
                f"map: gram_groups={groups} does not divide both {length} and {dim * tokens}; "
                f"choose a divisor of {common}"
            )
        self.dim, self.tokens, self.width = dim, tokens, width
        self.reduce = nn.Sequential(nn.Conv2d(dim, width, 1, bias=False), nn.BatchNorm2d(width))
        expand = nn.Conv2d(length, dim * tokens, 1, bias=False, groups=groups)
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(dim * tokens))
        upper = torch.triu_indices(width, width)
        self.register_buffer("upper", upper[0] * width + upper[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, tokens, dim] of a map [B, dim, H, W]."""
        entries = self.gramian_entries(batch_normed(self.reduce[1], self.reduce[0](x))).to(x.dtype)
        interleaved = entries.unflatten(1, (-1, self.tokens)).transpose(1, 2).flatten(1)
        expanded = batch_normed(self.expand[1], self.expand[0](interleaved[..., None, None]))
        return expanded.flatten(1).unflatten(1, (self.dim, self.tokens)).transpose(1, 2)

    def gramian_entries(self, reduced: Tensor) -> Tensor:
        """Return the normalized upper triangle of the Gramian matrix of [B, width, H, W]: [B, L]."""
        with autocast_off(reduced):
            rows = reduced.flatten(2)
            rows = at_least_float32(rows) / rows.shape[-1]
            return F.normalize(torch.matmul(rows, rows.transpose(1, 2)).flatten(1)[:, self.upper], dim=-1)


class LearnedTokens(nn.Module):
    """Return the same learned tokens [B, tokens, dim], initially 0, for every image."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, tokens, dim] for a map [B, dim, H, W]."""
        return self.token.to(x.dtype).expand(len(x), -1, -1)

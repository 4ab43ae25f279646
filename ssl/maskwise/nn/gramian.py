"""Tokens that stand for how an image's channels go together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.batch_norm import batch_normed


class GramianTokens(nn.Module):
    """A map [B, dim, H, W] -> tokens [B, tokens, dim], each a function of the image.

    R = BN(conv1x1(map)) of `width` channels, by default dim; the upper triangle of R R^T, diagonal included, of length
    L = width (width + 1) / 2, is brought to length 1, dealt out in `tokens` turns (entries 0, T, 2T, ... first) and goes
    through a 1x1 convolution in `groups` groups to dim * tokens channels and a batch norm; channel o * tokens + t is
    coordinate o of token t. The matrix and its length are float32 at least, autocast off: its entries span too many
    magnitudes for halves. groups None: the most that divide both sides, at most 32. Raises UserError where `tokens`
    or `groups` do not divide. Ryu et al. 2023; pooling.md 3.1.
    """

    def __init__(self, dim: int, tokens: int, width: int | None = None, groups: int | None = None):
        super().__init__()
        width = width or dim
        length = width * (width + 1) // 2
        if length % tokens:
            raise UserError(f"map: {tokens} tokens do not divide the {length} entries of a Gramian matrix {width} wide; choose another gram_width")
        both = math.gcd(length, dim * tokens)
        groups = groups or max(g for g in range(1, 33) if both % g == 0)
        if both % groups:
            raise UserError(f"map: gram_groups={groups} does not divide both {length} and {dim * tokens}; choose a divisor of {both}")
        self.dim, self.tokens, self.width = dim, tokens, width
        self.reduce = nn.Sequential(nn.Conv2d(dim, width, 1, bias=False), nn.BatchNorm2d(width))
        self.expand = nn.Sequential(nn.Conv2d(length, dim * tokens, 1, bias=False, groups=groups), nn.BatchNorm2d(dim * tokens))
        upper = torch.triu_indices(width, width)
        self.register_buffer("upper", upper[0] * width + upper[1], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, tokens, dim]."""
        entries = self.entries(batch_normed(self.reduce[1], self.reduce[0](image))).to(image.dtype)
        dealt = entries.unflatten(1, (-1, self.tokens)).transpose(1, 2).flatten(1)
        expanded = batch_normed(self.expand[1], self.expand[0](dealt[..., None, None]))
        return expanded.flatten(1).unflatten(1, (self.dim, self.tokens)).transpose(1, 2)

    def entries(self, reduced: Tensor) -> Tensor:
        """[B, width, H, W] -> the upper triangle of its Gramian matrix, of length 1: [B, L], float32 at least."""
        with torch.autocast(reduced.device.type, enabled=False):
            rows = reduced.flatten(2)
            rows = (rows if rows.dtype == torch.float64 else rows.float()) / rows.shape[-1]
            return F.normalize(torch.matmul(rows, rows.transpose(1, 2)).flatten(1)[:, self.upper], dim=-1)


class LearnedTokens(nn.Module):
    """A map [B, dim, H, W] -> the same tokens [B, tokens, dim] for every image, learned, initially 0."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, tokens, dim))

    def forward(self, image: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, tokens, dim]."""
        return self.token.to(image.dtype).expand(len(image), -1, -1)

"""Linear classifiers on several tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointHead(nn.Module):
    """Tokens [B, T, dim] -> logits [B, classes]: all of them side by side through one LayerNorm (eps 1e-5) and one linear layer.

    `each` tells what every token says of its own. With norm=False there is no LayerNorm. pooling.md 3.1.
    """

    def __init__(self, dim: int, tokens: int, classes: int, norm: bool = True):
        super().__init__()
        self.tokens = tokens
        self.norm = nn.LayerNorm(tokens * dim) if norm else nn.Identity()
        self.head = nn.Linear(tokens * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, classes]."""
        return self.head(self.norm(x.flatten(1)))

    def each(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, classes]; without the bias, which belongs to none of them: their sum and the bias are the logits."""
        split = self.norm(x.flatten(1)).unflatten(1, (self.tokens, -1))
        weight = self.head.weight.unflatten(1, (self.tokens, -1))
        return torch.einsum("btd,ctd->btc", split, weight)


class SplitHead(nn.Module):
    """Tokens [B, T, dim] -> logits [B, classes], the sum of a LayerNorm and a linear layer of every token's own (the paper's words)."""

    def __init__(self, dim: int, tokens: int, classes: int, norm: bool = True):
        super().__init__()
        self.tokens = tokens
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(tokens))
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(tokens))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, classes]."""
        return self.each(x).sum(dim=1)

    def each(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, classes]."""
        return torch.stack([F.linear(norm(token), head.weight, head.bias) for norm, head, token in zip(self.norms, self.heads, x.unbind(1))], dim=1)

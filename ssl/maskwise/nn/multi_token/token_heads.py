"""Linear classifiers on the tokens of a group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointHead(nn.Module):
    """LayerNorm and one linear layer on concatenated tokens: [B, T, dim] -> logits [B, classes].

    With norm=False there is no LayerNorm, as in the released MobileNet.
    """

    def __init__(self, dim: int, tokens: int, classes: int, norm: bool = True):
        super().__init__()
        self.tokens = tokens
        self.norm = nn.LayerNorm(tokens * dim) if norm else nn.Identity()
        self.head = nn.Linear(tokens * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, classes] of tokens [B, T, dim]."""
        return self.head(self.norm(x.flatten(1)))

    def token_logits(self, x: Tensor) -> Tensor:
        """Return each token's share of the logits, [B, T, classes]; their sum plus the bias are the logits."""
        split = self.norm(x.flatten(1)).unflatten(1, (self.tokens, -1))
        weight = self.head.weight.unflatten(1, (self.tokens, -1))
        return torch.einsum("btd,ctd->btc", split, weight)


class SplitHead(nn.Module):
    """LayerNorm and linear layer per token, logits summed (MAP, Algorithm 1): [B, T, dim] -> [B, classes]."""

    def __init__(self, dim: int, tokens: int, classes: int, norm: bool = True):
        super().__init__()
        self.tokens = tokens
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(tokens))
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, classes] of tokens [B, T, dim]."""
        return self.token_logits(x).sum(dim=1)

    def token_logits(self, x: Tensor) -> Tensor:
        """Return each token's logits, [B, T, classes]."""
        parts = zip(self.norms, self.heads, x.unbind(1))
        return torch.stack([F.linear(norm(token), head.weight, head.bias) for norm, head, token in parts], dim=1)

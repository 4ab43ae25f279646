"""Dropout keyed by sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional import keyed_random


class KeyedDropout(nn.Module):
    """Dropout of x [B, ...] in train mode, keyed by sample.

    With `key` int64 [B] a sample's draws are a function of its key and of `place`, a number that separates the uses of
    one key; without it torch's generator is used.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, key: Tensor | None = None, place: int = 0) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or not self.rate:
            return x
        if key is None:
            return torch.nn.functional.dropout(x, self.rate)
        uniform = keyed_random.uniform(keyed_random.make_key(key.to(x.device), place), x[0].numel()).view_as(x)
        return x * (uniform >= self.rate).to(x.dtype) / (1 - self.rate)

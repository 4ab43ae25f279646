"""Dropout whose draws belong to a sample, not to a stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional import draws


class KeyedDropout(nn.Module):
    """x [B, ...] with a share `rate` of its entries 0 and the others divided by 1 - rate; nothing outside train mode.

    With `key` int64 [B] an image's draws are a function of its key and `place`, a number of the caller's that tells its
    uses apart; without it torch draws.
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
        drawn = draws.uniform(draws.mix(key.to(x.device), place), x[0].numel()).view_as(x)
        return x * (drawn >= self.rate).to(x.dtype) / (1 - self.rate)

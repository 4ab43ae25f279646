"""Stochastic depth with a per-sample random key, independent of batch order and ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional import keyed_random


class DropPath(nn.Module):
    """Factors of the residual branches: 0 for a dropped branch, 1 / keep otherwise (Huang et al., Stochastic Depth).

    The rate grows linearly from 0 at the first block to `rate` at the last; the branches of a block are drawn
    independently. No parameters; active in train mode only.
    """

    def __init__(self, depth: int, rate: float, branches: int = 2):
        super().__init__()
        self.depth, self.branches = depth, branches
        self.rate = rate

    @property
    def rates(self) -> list[float]:
        """Drop rate of each block."""
        return [self.rate * i / max(1, self.depth - 1) for i in range(self.depth)]

    def forward(self, batch: int, like: Tensor, key: Tensor | None = None) -> Tensor | None:
        """Draw factors [depth, branches, B, 1, 1] in the dtype of `like`; None where nothing is dropped.

        `key` int64 [B] makes a sample's factors a function of its key, block and branch; without it torch's generator
        is used.
        """
        if not self.training or self.rates[-1] == 0:
            return None
        device = like.device
        if key is None:
            uniform = torch.rand(batch, self.depth, self.branches, dtype=torch.float64, device=device)
        else:
            block = torch.arange(self.depth, device=device)[:, None]
            branch = torch.arange(self.branches, device=device)
            uniform = keyed_random.uniform(keyed_random.make_key(key.to(device)[:, None, None], block, branch), 1)[
                ..., 0
            ]
        # from integers and one division on the device: no tensor is copied from the host
        block = torch.arange(self.depth, dtype=torch.float64, device=device)[:, None]
        keep = 1 - self.rate * block / max(1, self.depth - 1)
        return ((uniform < keep) / keep).to(like.dtype).permute(1, 2, 0)[..., None, None]

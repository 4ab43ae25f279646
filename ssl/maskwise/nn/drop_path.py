"""Stochastic depth whose draws belong to a sample, not to a stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional import draws


class DropPath(nn.Module):
    """Factors of the residual branches: 0 where a branch is dropped, 1 / keep where it stays (attmask.md 1.1).

    The rate grows linearly from 0 at the first block to `rate` at the last; the branches of a block, two in most, draw
    independently. Has no weights; active in train mode only.
    """

    def __init__(self, depth: int, rate: float, branches: int = 2):
        super().__init__()
        self.depth, self.branches = depth, branches
        self.rate = rate

    @property
    def rates(self) -> list[float]:
        """The rate of each block."""
        return [self.rate * i / max(1, self.depth - 1) for i in range(self.depth)]

    def forward(self, batch: int, like: Tensor, key: Tensor | None = None) -> Tensor | None:
        """Return factors [depth, branches, B, 1, 1] in the dtype of `like`, or None where nothing is dropped.

        `key` int64 [B] makes a row's factors a function of its key, the block and the branch; without it torch draws.
        """
        if not self.training or self.rates[-1] == 0:
            return None
        device = like.device
        if key is None:
            drawn = torch.rand(batch, self.depth, self.branches, dtype=torch.float64, device=device)
        else:
            block = torch.arange(self.depth, device=device)[:, None]
            branch = torch.arange(self.branches, device=device)
            drawn = draws.uniform(draws.mix(key.to(device)[:, None, None], block, branch), 1)[..., 0]
        # made of integers and one division on the device, so that no tensor is copied there from the host
        block = torch.arange(self.depth, dtype=torch.float64, device=device)[:, None]
        keep = 1 - self.rate * block / max(1, self.depth - 1)
        return ((drawn < keep) / keep).to(like.dtype).permute(1, 2, 0)[..., None, None]

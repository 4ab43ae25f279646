"""HOW: neighborhood averages weighted by the norms of their patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.nn.pooling.base import VARIANTS, Pooling, Variant, as_map, check_choice, linear
from maskwise.nn.tokens import Pooled


class HOW(Pooling):
    """Sum of |x_j| FC(avg3(X))_j, normalized to length 1 (SimPool, eq. B9-B12, with the norm in place of its square).

    Attention: |x_j|, normalized to a sum of 1. variant="released" learns FC; "paper" freezes it: the identity until
    `whiten_` sets the whitening of a training set.
    """

    gives_attention = True

    def __init__(self, dim: int, variant: Variant = "released"):
        super().__init__(dim)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.fc = nn.Linear(dim, dim)
        if variant == "paper":
            nn.init.eye_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
            self.fc.requires_grad_(False)

    @torch.no_grad()
    def whiten_(self, descriptors: Tensor, eps: float = 1e-6) -> HOW:
        """Set FC to centering and PCA whitening of neighborhood averages [n, D]; return self."""
        descriptors = descriptors.double()
        mean = descriptors.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov((descriptors - mean).T))
        weight = (vectors / (values.clamp_min(0) + eps).sqrt()).T.flip(0)
        self.fc.weight.copy_(weight)
        self.fc.bias.copy_(-weight @ mean)
        return self

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Direction of the norm-weighted sum of neighborhood averages."""
        norms = (x.square().sum(dim=-1) + 1e-10).sqrt()
        attention = (norms / norms.sum(dim=-1, keepdim=True)).unsqueeze(1)
        averages = F.avg_pool2d(as_map(x, grid), 3, stride=1, padding=1, count_include_pad=False)
        # FC is affine and the weights sum to 1, so FC of the sum equals the sum of FCs.
        summed = linear(self.fc, torch.matmul(attention, averages.flatten(2).transpose(1, 2))[:, 0])
        return Pooled(F.normalize(summed, dim=-1, eps=1e-6), attention)

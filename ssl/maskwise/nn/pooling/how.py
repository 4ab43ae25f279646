"""HOW: neighbourhood averages, each weighed by the length of its patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.nn.pooling.pooling import VARIANTS, Pooling, as_map, linear
from maskwise.nn.tokens import Pooled


class HOW(Pooling):
    """sum_j |x_j| FC(avg3(X))_j, then to length 1. Attention: |x_j|, shared out to a sum of 1.

    variant="released" learns FC, a linear layer with bias; "paper" holds it fixed: the identity until `whiten_` sets the
    whitening of a training set. Weights: D^2 + D. SimPool paper eq. B9-B12, with the norm where (B9) prints its square.
    """

    gives_attention = True

    def __init__(self, dim: int, variant: str = "released"):
        super().__init__(dim)
        self.variant = self.chosen("variant", variant, VARIANTS)
        self.fc = nn.Linear(dim, dim)
        if variant == "paper":
            nn.init.eye_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
            self.fc.requires_grad_(False)

    @torch.no_grad()
    def whiten_(self, descriptors: Tensor, eps: float = 1e-6) -> HOW:
        """Set FC to centering and PCA whitening of neighbourhood averages [n, D]; returns itself."""
        wide = descriptors.double()
        mean = wide.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov((wide - mean).T))
        weight = (vectors / (values.clamp_min(0) + eps).sqrt()).T.flip(0)
        self.fc.weight.copy_(weight)
        self.fc.bias.copy_(-weight @ mean)
        return self

    def pool(self, x: Tensor, grid) -> Pooled:
        """Neighbourhoods weighed by norms; only the direction of their sum is kept."""
        norms = (x.square().sum(dim=-1) + 1e-10).sqrt()
        attention = (norms / norms.sum(dim=-1, keepdim=True)).unsqueeze(1)
        near = F.avg_pool2d(as_map(x, grid), 3, stride=1, padding=1, count_include_pad=False).flatten(2).transpose(1, 2)
        # FC is affine and the weights sum to 1: FC of the sum is the sum of FCs
        summed = linear(self.fc, torch.matmul(attention, near)[:, 0])
        return Pooled(F.normalize(summed, dim=-1, eps=1e-6), attention)

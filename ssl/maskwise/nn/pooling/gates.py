"""Poolings that weigh channels, and then places, by a bottleneck of the average: SE, CBAM, gather-excite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.nn.batch_norm import batch_normed
from maskwise.nn.pooling.pooling import VARIANTS, Pooling, as_map, gate, gated
from maskwise.nn.tokens import Pooled

REDUCTION = 16


def bottleneck(dim: int) -> int:
    """Hidden width of a gate: a sixteenth, 8 at least."""
    return max(8, dim // REDUCTION)


class SE(Pooling):
    """Squeeze-and-excitation, then the average: sigmoid(MLP(u)) * u of the average u. No attention.

    variant="released" has a residual and a ReLU: the average of ReLU(X + gate * X). SimPool paper eq. B25-B28.
    """

    def __init__(self, dim: int, variant: str = "paper"):
        super().__init__(dim)
        self.variant = self.chosen("variant", variant, VARIANTS)
        self.mlp = gate(dim, bottleneck(dim))

    def pool(self, x: Tensor, grid) -> Pooled:
        """The average of gated channels."""
        average = x.mean(dim=1)
        open_ = torch.sigmoid(gated(self.mlp, average))
        if self.variant == "released":
            return Pooled(F.relu(x + open_.unsqueeze(1) * x).mean(dim=1), None)
        return Pooled(open_ * average, None)


class CBAM(Pooling):
    """Channel gate, then a spatial one over a 7 x 7 neighbourhood, then the average.

    Attention: the spatial gate over N, so that its sum is below 1. variant="released" gates by average and maximum in both
    and has a batch norm; "paper" by averages alone. (The released code returned the map; it is averaged here.)
    SimPool paper eq. B29-B37.
    """

    gives_attention = True

    def __init__(self, dim: int, variant: str = "released"):
        super().__init__(dim)
        self.variant = self.chosen("variant", variant, VARIANTS)
        self.mlp = gate(dim, bottleneck(dim), bias=False)
        self.conv = nn.Conv2d(2 if variant == "released" else 1, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1) if variant == "released" else None

    def pool(self, x: Tensor, grid) -> Pooled:
        """The average of what both gates let through."""
        full = self.variant == "released"
        squeezed = gated(self.mlp, x.mean(dim=1))
        if full:
            squeezed = squeezed + gated(self.mlp, x.amax(dim=1))
        channels = torch.sigmoid(squeezed).unsqueeze(1)
        v = channels * x
        seen = [v.mean(dim=-1), v.amax(dim=-1)] if full else [v.mean(dim=-1)]
        scores = F.conv2d(as_map(torch.stack(seen, dim=-1), grid), self.conv.weight.to(x.dtype), padding=3)
        if self.norm is not None:
            scores = batch_normed(self.norm, scores)
        attention = torch.sigmoid(scores).flatten(2) / x.shape[1]
        return Pooled(torch.matmul(attention, v)[:, 0], attention)


class GE(Pooling):
    """Gather-excite of extent 2, then the average: a gate for every channel and place, from a strided 3 x 3 convolution. No attention.

    variant="released" has a residual and a ReLU, as SE. Weights at D = 512: 38,944 (timm's module).
    """

    def __init__(self, dim: int, variant: str = "paper"):
        super().__init__(dim)
        self.variant = self.chosen("variant", variant, VARIANTS)
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.mlp = gate(dim, bottleneck(dim))

    def pool(self, x: Tensor, grid) -> Pooled:
        """The average of gated patches."""
        maps = as_map(x, grid)
        gathered = batch_normed(self.norm, F.conv2d(maps, self.conv.weight.to(x.dtype), stride=2, padding=1, groups=self.dim))
        open_ = gated(self.mlp, gathered.movedim(1, -1)).movedim(-1, 1)
        excited = torch.sigmoid(F.interpolate(open_, size=maps.shape[2:])) * maps
        if self.variant == "released":
            excited = F.relu(maps + excited)
        return Pooled(excited.mean(dim=(2, 3)), None)

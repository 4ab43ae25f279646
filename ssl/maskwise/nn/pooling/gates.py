"""Channel and spatial gates followed by average pooling: SE, CBAM, gather-excite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.nn.batch_norm import batch_normed
from maskwise.nn.pooling.base import VARIANTS, Pooling, Variant, apply_mlp, as_map, bottleneck_mlp, check_choice
from maskwise.nn.tokens import Pooled

REDUCTION = 16


def hidden_width(dim: int) -> int:
    """Return the hidden width of a gate's MLP: dim / 16, at least 8."""
    return max(8, dim // REDUCTION)


class SE(Pooling):
    """Squeeze-and-excitation, then the average u: sigmoid(MLP(u)) * u (SimPool, eq. B25-B28).

    variant="released" adds a residual and a ReLU: the average of ReLU(X + gate * X).
    """

    def __init__(self, dim: int, variant: Variant = "paper"):
        super().__init__(dim)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.mlp = bottleneck_mlp(dim, hidden_width(dim))

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Average of the gated channels."""
        average = x.mean(dim=1)
        gate = torch.sigmoid(apply_mlp(self.mlp, average))
        if self.variant == "released":
            return Pooled(F.relu(x + gate.unsqueeze(1) * x).mean(dim=1), None)
        return Pooled(gate * average, None)


class CBAM(Pooling):
    """Channel gate, then a spatial gate over 7 x 7 neighborhoods, then the average (SimPool, eq. B29-B37).

    Attention: the spatial gate / N, whose sum is below 1. variant="released" computes both gates from average and
    maximum and has a batch norm; "paper" uses averages alone.
    """

    gives_attention = True

    def __init__(self, dim: int, variant: Variant = "released"):
        super().__init__(dim)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.mlp = bottleneck_mlp(dim, hidden_width(dim), bias=False)
        self.conv = nn.Conv2d(2 if variant == "released" else 1, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1) if variant == "released" else None

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Average of the patches under both gates."""
        with_maximum = self.variant == "released"
        squeezed = apply_mlp(self.mlp, x.mean(dim=1))
        if with_maximum:
            squeezed = squeezed + apply_mlp(self.mlp, x.amax(dim=1))
        values = torch.sigmoid(squeezed).unsqueeze(1) * x
        statistics = [values.mean(dim=-1), values.amax(dim=-1)] if with_maximum else [values.mean(dim=-1)]
        scores = F.conv2d(as_map(torch.stack(statistics, dim=-1), grid), self.conv.weight.to(x.dtype), padding=3)
        if self.norm is not None:
            scores = batch_normed(self.norm, scores)
        attention = torch.sigmoid(scores).flatten(2) / x.shape[1]
        return Pooled(torch.matmul(attention, values)[:, 0], attention)


class GE(Pooling):
    """Gather-excite of extent 2, then the average: a gate per channel and patch from a strided 3 x 3 convolution.

    variant="released" adds a residual and a ReLU, as in SE.
    """

    def __init__(self, dim: int, variant: Variant = "paper"):
        super().__init__(dim)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.mlp = bottleneck_mlp(dim, hidden_width(dim))

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Average of the gated patches."""
        maps = as_map(x, grid)
        gathered = F.conv2d(maps, self.conv.weight.to(x.dtype), stride=2, padding=1, groups=self.dim)
        gathered = batch_normed(self.norm, gathered)
        logits = apply_mlp(self.mlp, gathered.movedim(1, -1)).movedim(-1, 1)
        excited = torch.sigmoid(F.interpolate(logits, size=maps.shape[2:])) * maps
        if self.variant == "released":
            excited = F.relu(maps + excited)
        return Pooled(excited.mean(dim=(2, 3)), None)

"""Poolings without attention: average, maximum, their mean, power mean, log-sum-exp."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Positive
from maskwise.errors import UserError
from maskwise.functional.power_means import power_mean
from maskwise.nn.pooling.base import VARIANTS, Pooling, Variant, as_map, check_choice
from maskwise.nn.tokens import Pooled

FLOOR = 1e-6  # smallest value under GeM's power
WINDOW = 7  # side of the released GeM's pooling window


class GAP(Pooling):
    """Global average pooling (SimPool, eq. B2)."""

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Average over patches."""
        return Pooled(x.mean(dim=1), None)


class Max(Pooling):
    """Global maximum pooling (SimPool, eq. B3)."""

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Maximum of each channel over patches."""
        return Pooled(x.amax(dim=1), None)


class GAPMax(Pooling):
    """Mean of average and maximum pooling."""

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Mean of the average and the maximum over patches."""
        return Pooled((x.mean(dim=1) + x.amax(dim=1)) / 2, None)


class GeM(Pooling):
    """Generalized mean with one exponent, learned, over values clamped to at least 1e-6 (SimPool, eq. B5).

    variant="released": a fixed exponent and power sums over 7 x 7 windows without division by their size (7 times the
    mean for exponent 2 on a 7 x 7 grid), averaged over windows. Raises UserError for an exponent not above 0.
    """

    def __init__(self, dim: int, gamma: Positive = 2.0, variant: Variant = "paper"):
        super().__init__(dim)
        if gamma <= 0:
            raise UserError(f"pooling.gamma={gamma} is not above 0: choose 2, or 3 as in retrieval")
        self.gamma = gamma
        self.variant = check_choice("variant", variant, VARIANTS)
        self.exponent = nn.Parameter(torch.full((1,), float(gamma))) if variant == "paper" else None

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Power mean over patches, or the average over windows of their power sums."""
        if self.exponent is not None:
            uniform = x.new_full((1, 1, x.shape[1]), 1 / x.shape[1])
            exponent = self.exponent.to(x.dtype).clamp_min(0.1)
            return Pooled(power_mean(uniform, x.clamp_min(FLOOR), exponent)[:, 0], None)
        maps = as_map(x, grid)
        window = tuple(min(WINDOW, side) for side in maps.shape[2:])
        sums = F.avg_pool2d(maps.clamp_min(0).pow(self.gamma), window) * math.prod(window)
        return Pooled(sums.clamp_min(FLOOR**self.gamma).pow(1 / self.gamma).mean(dim=(2, 3)), None)


class LSE(Pooling):
    """Log-mean-exp, log(mean_j exp(r x_j)) / r with a learned scale r (SimPool, eq. B7).

    Between the average (r -> 0) and the maximum. Raises UserError for a scale not above 0.
    """

    def __init__(self, dim: int, scale: Positive = 10.0):
        super().__init__(dim)
        if scale <= 0:
            raise UserError(f"pooling.scale={scale} is not above 0: choose 10, as in the paper")
        self.scale = scale
        self.r = nn.Parameter(torch.full((1,), float(scale)))

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Log-mean-exp over patches."""
        r = self.r.to(x.dtype)
        return Pooled((torch.logsumexp(r * x, dim=1) - math.log(x.shape[1])) / r, None)

"""Means of the patches that attend to nothing: average, maximum, half of each, power mean, log-sum-exp."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.functional.means import power_mean
from maskwise.nn.pooling.pooling import VARIANTS, Pooling, as_map
from maskwise.nn.tokens import Pooled

FLOOR = 1e-6  # what GeM takes a value for that is not above it
WINDOW = 7  # of the released GeM


class GAP(Pooling):
    """The average of the patches. No attention, no weights (SimPool paper eq. B2)."""

    def pool(self, x: Tensor, grid) -> Pooled:
        """The mean over patches."""
        return Pooled(x.mean(dim=1), None)


class Max(Pooling):
    """The largest value of each channel. No attention, no weights (SimPool paper eq. B3)."""

    def pool(self, x: Tensor, grid) -> Pooled:
        """The maximum over patches."""
        return Pooled(x.amax(dim=1), None)


class GAPMax(Pooling):
    """Half the average and half the maximum of the patches. No attention, no weights."""

    def pool(self, x: Tensor, grid) -> Pooled:
        """The mean of mean and maximum."""
        return Pooled((x.mean(dim=1) + x.amax(dim=1)) / 2, None)


class GeM(Pooling):
    """The power mean of the patches with one exponent, values below 1e-6 taken for 1e-6. No attention; one weight.

    variant="released" is the code behind the paper's figures: a fixed exponent, and a power sum over windows of 7 x 7 that is
    never divided by their size (7 times the mean on 7 x 7 and exponent 2); its windows are averaged here.
    Raises UserError for an exponent that is not above 0. SimPool paper eq. B5.
    """

    def __init__(self, dim: int, gamma: float = 2.0, variant: str = "paper"):
        super().__init__(dim)
        if gamma <= 0:
            raise UserError(f"pooling.gamma={gamma} is not above 0: choose 2, or 3 as in retrieval")
        self.gamma, self.variant = gamma, self.chosen("variant", variant, VARIANTS)
        self.exponent = nn.Parameter(torch.full((1,), float(gamma))) if variant == "paper" else None

    def pool(self, x: Tensor, grid) -> Pooled:
        """The power mean over patches, or the average of the windows' power sums."""
        if self.exponent is not None:
            even = x.new_full((1, 1, x.shape[1]), 1 / x.shape[1])
            return Pooled(power_mean(even, x.clamp_min(FLOOR), self.exponent.to(x.dtype).clamp_min(0.1))[:, 0], None)
        maps = as_map(x, grid)
        window = tuple(min(WINDOW, side) for side in maps.shape[2:])
        sums = F.avg_pool2d(maps.clamp_min(0).pow(self.gamma), window) * math.prod(window)
        return Pooled(sums.clamp_min(FLOOR**self.gamma).pow(1 / self.gamma).mean(dim=(2, 3)), None)


class LSE(Pooling):
    """Log-sum-exp: log(mean_j exp(r x_j)) / r with one learned scale r, from the mean (r -> 0) to the maximum. No attention; one weight.

    Raises UserError for a scale that is not above 0. SimPool paper eq. B7.
    """

    def __init__(self, dim: int, scale: float = 10.0):
        super().__init__(dim)
        if scale <= 0:
            raise UserError(f"pooling.scale={scale} is not above 0: choose 10, as the paper")
        self.scale = scale
        self.r = nn.Parameter(torch.full((1,), float(scale)))

    def pool(self, x: Tensor, grid) -> Pooled:
        """The log-mean-exp over patches."""
        r = self.r.to(x.dtype)
        return Pooled((torch.logsumexp(r * x, dim=1) - math.log(x.shape[1])) / r, None)

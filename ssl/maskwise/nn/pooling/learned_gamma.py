"""Options of SimPool's exponent as a weight (SimPool, appendix C.4: learnable alpha)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwise.bounds import Positive
from maskwise.errors import UserError

GAMMA_MIN = 0.1  # as in GeM: closer to 0 the root of the mean is dominated by rounding


@dataclass(frozen=True)
class LearnedGamma:
    """Whether gamma is learned, its upper bound, and the factor on its learning rate.

    The weight starts at SimPool's `gamma` and is clamped to [0.1, gamma_max]. The paper clamps at 5 and divides the
    learning rate by 10.
    """

    learn_gamma: bool = False
    gamma_max: Positive | None = None
    gamma_lr: Positive = 1.0

    @property
    def upper_bound(self) -> float:
        """The largest value of gamma."""
        return math.inf if self.gamma_max is None else self.gamma_max

    def check(self, gamma: float | None) -> None:
        """Raise UserError for bounds that exclude the initial gamma, or options of a gamma that is not learned."""
        if not self.learn_gamma:
            unused = [("gamma_max", self.gamma_max, None), ("gamma_lr", self.gamma_lr, 1.0)]
            for key, value, default in unused:
                if value != default:
                    raise UserError(
                        f"pooling.{key}={value} applies to a learned gamma only, and pooling.learn_gamma is false: "
                        f"set it to true, or leave {key} out"
                    )
            return
        if gamma is None or not GAMMA_MIN <= gamma <= self.upper_bound:
            remedy = f"{GAMMA_MIN} or more, such as 2"
            if self.gamma_max is not None:
                remedy = f"from {GAMMA_MIN} to gamma_max={self.gamma_max}"
            raise UserError(
                f"pooling.gamma={gamma} is outside the bounds of a learned gamma (pooling.learn_gamma): choose {remedy}"
            )
        if self.gamma_lr <= 0:
            raise UserError(
                f"pooling.gamma_lr={self.gamma_lr} is not above 0: choose 0.1, or pooling.learn_gamma=false "
                "for a constant gamma"
            )

    def clamp(self, exponent: Tensor) -> Tensor:
        """Clamp the weight [1] to its bounds; see StraightThroughClamp for the gradient."""
        return StraightThroughClamp.apply(exponent, GAMMA_MIN, self.upper_bound)


class StraightThroughClamp(torch.autograd.Function):
    """Clamp to an interval; beyond a bound, pass only gradients whose descent step leads back inside."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        """Return x clamped to [low, high]."""
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, or 0 where descent leads further outside."""
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return torch.where(outward, 0, grad), None, None

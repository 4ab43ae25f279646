"""Activation checkpointing: recomputation in the backward pass instead of saved tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHECKPOINTING = ("none", "elementwise", "blocks")


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x); its backward pass recomputes tensors instead of saving them.

    Recomputation stops at the last tensor needed: a final linear layer is not run again.
    """
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)

"""Teacher targets: centering and sharpening, or Sinkhorn-Knopp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskwise.functional.precision import at_least_float32


def center_and_sharpen(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Return softmax((logits - center) / temp) in at least float32: [..., K], [K] -> [..., K] (DINO, sec. 3.1)."""
    return torch.softmax((at_least_float32(logits) - center) / temp, dim=-1)


def update_center(center: Tensor, batch_mean: Tensor, momentum: float = 0.9) -> Tensor:
    """Return the next center, momentum * center + (1 - momentum) * batch_mean, all [K] (DINO, eq. 4)."""
    return center * momentum + batch_mean * (1 - momentum)


def sinkhorn(
    logits: Tensor, temp: float, iterations: int = 3, all_sum: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return assignments that use prototypes evenly: [M, K] -> [M, K], rows sum to 1 (SwAV, sec. 3.1).

    Works on logarithms, so it cannot overflow; an iteration balances prototypes over the batch, then rows. With
    all_sum, a sum over ranks, the batch is that of all ranks, which may have different M, or none.
    """
    logits = at_least_float32(logits) / temp
    rows = logits.new_zeros(logits.shape[0], 1)
    columns = logits.new_zeros(logits.shape[1])
    for _ in range(iterations):
        columns = -_union(torch.logsumexp(logits + rows, dim=0), all_sum)
        rows = -torch.logsumexp(logits + columns, dim=1, keepdim=True)
    return torch.softmax(logits + columns, dim=1)


def _union(local: Tensor, all_sum: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the log-sum-exp over ranks of each rank's log-sum-exp [K], by sums over ranks."""
    if all_sum is None:
        return local
    values = local.double()
    present = torch.isfinite(values)  # not so on a rank without rows
    total = all_sum(torch.stack([torch.where(present, values, 0.0), present.double()]))
    shift = total[0] / total[1].clamp_min(1.0)
    return (shift + torch.log(all_sum(torch.exp((values - shift).clamp(max=700.0))))).to(local.dtype)

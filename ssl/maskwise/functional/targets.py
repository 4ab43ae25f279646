"""What the teacher asks for: centred and sharpened, or balanced by Sinkhorn-Knopp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def center_and_sharpen(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """softmax((logits - center) / temp): [..., K], [K] -> [..., K], at least float32 (Caron et al. 2021, attmask.md 1.4)."""
    return torch.softmax((_full(logits) - center) / temp, dim=-1)


def update_center(center: Tensor, batch_mean: Tensor, momentum: float = 0.9) -> Tensor:
    """The next center, a new tensor: momentum * center + (1 - momentum) * batch_mean, all [K] (attmask.md 1.5)."""
    return center * momentum + batch_mean * (1 - momentum)


def sinkhorn(logits: Tensor, temp: float, iterations: int = 3, all_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Assignments whose prototypes are used evenly: [M, K] -> [M, K], rows sum to 1 (SwAV, Caron et al. 2020).

    Works on logarithms, so it cannot overflow: each iteration evens the prototypes over the batch, then the rows.
    all_sum sums a tensor over ranks and makes the batch the union of theirs; ranks may hold different M, or none.
    """
    logits = _full(logits) / temp
    rows = logits.new_zeros(logits.shape[0], 1)
    columns = logits.new_zeros(logits.shape[1])
    for _ in range(iterations):
        columns = -_union(torch.logsumexp(logits + rows, dim=0), all_sum)
        rows = -torch.logsumexp(logits + columns, dim=1, keepdim=True)
    return torch.softmax(logits + columns, dim=1)


def _union(local: Tensor, all_sum: Callable[[Tensor], Tensor] | None) -> Tensor:
    """log-sum-exp over ranks of the logsumexp each rank holds, with sums as the only means of talking."""
    if all_sum is None:
        return local
    wide = local.double()
    holds = torch.isfinite(wide)  # a rank without rows has nothing to say
    total = all_sum(torch.stack([torch.where(holds, wide, 0.0), holds.double()]))
    shift = total[0] / total[1].clamp_min(1.0)
    return (shift + torch.log(all_sum(torch.exp((wide - shift).clamp(max=700.0))))).to(local.dtype)


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

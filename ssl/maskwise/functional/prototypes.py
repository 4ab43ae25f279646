"""Cross-entropy against prototypes in pieces: neither logits nor probabilities [tokens, K] are ever whole in memory.

The last layer of a projection head is linear, so a piece of rows can make its logits, its targets, its loss and its
gradient, and forget them before the next piece comes. The gradient is exact and takes the matrix products that the
whole matrix would take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# entries of a piece's logits; on a CPU few enough for its caches, elsewhere many enough to fill the device
CELLS = {"cpu": 1 << 22}
CELLS_ELSEWHERE = 1 << 26

Score = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def loss_in_pieces(z: Tensor, weight: Tensor, score: Score, dtype: torch.dtype | None = None, cells: int | None = None) -> Tensor:
    """Sum of a loss over rows of logits: z [V, M, d], weight [K, d] -> scalar, with gradients for z and weight.

    score(logits [V, n, K] in float32 at least, start, stop) gives the loss of the rows start..stop of all V and its
    gradient in the logits, [V, n, K]; it may overwrite the logits. Logits are products in `dtype` (default: that of z).
    """
    return _InPieces.apply(z, weight, score, dtype or z.dtype, cells)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, score, dtype, cells):
        views, rows, _ = z.shape
        narrow, prototypes = z.detach().to(dtype), weight.detach().to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=z.device)
        slope_z, slope_weight = torch.zeros_like(narrow), torch.zeros(weight.shape, dtype=wide, device=z.device)
        step = max(1, (cells or CELLS.get(z.device.type, CELLS_ELSEWHERE)) // max(1, views * len(weight)))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = narrow[:, start:stop]
            value, slope = score(torch.matmul(part, prototypes.T).to(wide), start, stop)
            loss += value
            slope, part = slope.to(dtype), part.reshape(-1, part.shape[-1])
            slope_z[:, start:stop] = torch.matmul(slope, prototypes)
            if dtype == wide:
                slope_weight.addmm_(slope.flatten(0, 1).T, part)
            else:
                slope_weight += (slope.flatten(0, 1).T @ part).to(wide)
        ctx.save_for_backward(slope_z, slope_weight)
        ctx.dtypes = z.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return *((saved * slope).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes)), None, None, None


def score_views(probs: Callable[[int, int], Tensor], views: int, teachers: int, samples: int, temp: float, watch=None) -> Score:
    """The image term as a score: every student view against every other teacher view, as `losses.dino_loss_from_probs`.

    probs(start, stop) gives the teacher's distributions [G, n, K] of those samples; `watch(probs, logits, start, stop)`,
    when given, is called with them and with the student's logits [S, n, K] over `temp`.
    """
    scale = 1.0 / (teachers * (views - 1) * samples)

    def score(logits, start, stop):
        aims = probs(start, stop)
        everyone = aims.sum(dim=0)
        logits = logits.div_(temp)
        if watch is not None:
            watch(aims, logits, start, stop)
        slope = torch.log_softmax(logits, dim=-1)
        value = -(everyone * slope.sum(dim=0)).sum() + (aims * slope[:teachers]).sum()
        slope.exp_()
        slope[:teachers].mul_(teachers - 1).add_(aims)
        slope[teachers:].mul_(teachers)
        return value * scale, slope.sub_(everyone).mul_(scale / temp)

    return score


def score_rows(probs: Callable[[int, int], Tensor], weights: Tensor, temp: float, watch=None) -> Score:
    """The patch term as a score: row i of one view against probs(start, stop) [n, K], weighed by weights [M].

    `watch(probs, weights)`, when given, is called with the distributions and weights of every piece.
    """

    def score(logits, start, stop):
        aims, weight = probs(start, stop), weights[start:stop].to(logits.dtype)
        if watch is not None:
            watch(aims, weight)
        slope = torch.log_softmax(logits[0].div_(temp), dim=-1)
        value = -((aims * slope).sum(dim=-1) * weight).sum()
        return value, slope.exp_().sub_(aims).mul_((weight / temp)[:, None])[None]

    return score

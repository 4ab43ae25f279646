"""k-means of an image's patches."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn.pooling.several import Several, negative_square
from maskwise.nn.tokens import Pooled

STREAM = 53  # beside the streams of functional.draws


class KMeans(Several):
    """k centroids after at most `iterations` of Lloyd. Attention: 1 / size for the patches of a centroid's cluster, else 0; each row's sum 1.

    Begins at k patches whose places are a function of (seed, N). Ties go to the lowest index; an empty cluster keeps its
    centroid, and the attention that made it; an image whose centroids all moved less than `tolerance` stands still.
    The gradient flows through the last averages only. No weights. Raises UserError for iterations or tolerance out of
    range. SimPool paper eq. B16-B20.
    """

    def __init__(self, dim: int, k: int = 3, reduce: str = "max_logit", iterations: int = 5, tolerance: float = 0.01, seed: int = 0):
        super().__init__(dim, k, reduce)
        if iterations < 1 or tolerance < 0:
            wrong = f"iterations={iterations}" if iterations < 1 else f"tolerance={tolerance}"
            raise UserError(f"pooling.{wrong} is out of range: choose at least one iteration and a tolerance of at least 0")
        self.iterations, self.tolerance, self.seed = iterations, tolerance, seed

    def pool(self, x: Tensor, grid) -> Pooled:
        """The centroids of the patches."""
        attention = lloyd(x.detach(), self.k, self.iterations, self.tolerance, self.seed)
        return self.reduced(torch.matmul(attention, x), attention)


@torch.no_grad()
def lloyd(x: Tensor, k: int, iterations: int, tolerance: float, seed: int) -> Tensor:
    """Patches [B, N, D] -> the attention [B, k, N] of which the centroids are the averages."""
    start = [F.one_hot(torch.full((), place, device=x.device), x.shape[1]) for place in places(seed, x.shape[1], k)]
    attention = torch.stack(start).to(x.dtype).expand(len(x), -1, -1)
    u = torch.matmul(attention, x)
    moving = torch.ones(len(x), 1, 1, dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        members = F.one_hot(nearest(x, u), k).transpose(1, 2).to(x.dtype)  # [B, k, N]
        sizes = members.sum(dim=2, keepdim=True)
        attention = torch.where(moving & (sizes > 0), members / sizes.clamp_min(1), attention)
        moved = torch.matmul(attention, x)
        moving = moving & ((moved - u).norm(dim=-1).amax(dim=1)[:, None, None] >= tolerance)
        u = moved
    return attention


def nearest(x: Tensor, u: Tensor) -> Tensor:
    """The index of the nearest centroid of each patch, the lowest where several are as near: [B, N]."""
    distance = -negative_square(x, u)
    ranks = torch.arange(u.shape[1], device=x.device)[None, :, None].expand_as(distance)
    return torch.where(distance == distance.amin(dim=1, keepdim=True), ranks, u.shape[1]).amin(dim=1)


@functools.lru_cache
def places(seed: int, count: int, k: int) -> tuple[int, ...]:
    """The patches that k centroids begin at: distinct ones as long as there are enough."""
    with torch.device("cpu"):
        order = torch.argsort(draws.uniform(draws.mix(STREAM, seed, count), count)).tolist()
    return tuple(order[i % count] for i in range(k))

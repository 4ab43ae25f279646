"""k-means over the patches of an image."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bounds import Count, NonNegative
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn.pooling.multi_vector import MultiVectorPooling, Reduce, negative_squared_distance
from maskwise.nn.tokens import Pooled

STREAM = 53  # first word of the random key; see functional.keyed_random


class KMeans(MultiVectorPooling):
    """Centroids after at most `iterations` of Lloyd's algorithm (SimPool, eq. B16-B20).

    Attention: 1 / size for the patches of a centroid's cluster, 0 elsewhere. Initial centroids are patches at indices
    that depend on (seed, N). Ties go to the lowest index; an empty cluster keeps its centroid and attention; an image
    stops once all its centroids move less than `tolerance`. Gradients flow through the final averages only.
    Raises UserError for iterations or tolerance out of range.
    """

    def __init__(
        self,
        dim: int,
        k: Count = 3,
        reduce: Reduce = "max_logit",
        iterations: Count = 5,
        tolerance: NonNegative = 0.01,
        seed: int = 0,
    ):
        super().__init__(dim, k, reduce)
        if iterations < 1 or tolerance < 0:
            wrong = f"iterations={iterations}" if iterations < 1 else f"tolerance={tolerance}"
            raise UserError(
                f"pooling.{wrong} is out of range: choose at least one iteration and a tolerance of at least 0"
            )
        self.iterations, self.tolerance, self.seed = iterations, tolerance, seed

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Centroids of the patches."""
        attention = lloyd(x.detach(), self.k, self.iterations, self.tolerance, self.seed)
        return self.reduced(torch.matmul(attention, x), attention)


@torch.no_grad()
def lloyd(x: Tensor, k: int, iterations: int, tolerance: float, seed: int) -> Tensor:
    """Return the attention [B, k, N] whose averages of patches [B, N, D] are the centroids."""
    indices = initial_indices(seed, x.shape[1], k)
    one_hot = [F.one_hot(torch.full((), index, device=x.device), x.shape[1]) for index in indices]
    attention = torch.stack(one_hot).to(x.dtype).expand(len(x), -1, -1)
    centroids = torch.matmul(attention, x)
    active = torch.ones(len(x), 1, 1, dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        members = F.one_hot(nearest_centroid(x, centroids), k).transpose(1, 2).to(x.dtype)  # [B, k, N]
        sizes = members.sum(dim=2, keepdim=True)
        attention = torch.where(active & (sizes > 0), members / sizes.clamp_min(1), attention)
        moved = torch.matmul(attention, x)
        active = active & ((moved - centroids).norm(dim=-1).amax(dim=1)[:, None, None] >= tolerance)
        centroids = moved
    return attention


def nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of each patch's nearest centroid, the lowest on ties: [B, N]."""
    distance = -negative_squared_distance(x, centroids)
    indices = torch.arange(centroids.shape[1], device=x.device)[None, :, None].expand_as(distance)
    nearest = distance == distance.amin(dim=1, keepdim=True)
    return torch.where(nearest, indices, centroids.shape[1]).amin(dim=1)


@functools.lru_cache
def initial_indices(seed: int, num_patches: int, k: int) -> tuple[int, ...]:
    """Return the patches at which k centroids start; distinct unless there are fewer than k."""
    with torch.device("cpu"):
        key = keyed_random.make_key(STREAM, seed, num_patches)
        order = torch.argsort(keyed_random.uniform(key, num_patches)).tolist()
    return tuple(order[i % num_patches] for i in range(k))

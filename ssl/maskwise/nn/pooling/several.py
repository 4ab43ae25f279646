"""Poolings into k vectors, and how these become one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.pooling.pooling import Pooling, linear
from maskwise.nn.tokens import Pooled

REDUCTIONS = ("max_logit", "concat_project", "max_feature", "mean")


class Several(Pooling):
    """A pooling into `k` vectors [B, k, D], with an attention map for each, [B, k, N].

    `reduce` says how they become the vector: their "mean"; the "max_feature" of each channel; "concat_project", a linear layer
    on all of them; or "max_logit": their mean too, and `Pooled.vectors` carries them to a classifier, which takes for
    each class the largest of the k logits. Raises UserError for k below 1 or another `reduce`.
    """

    gives_attention = True

    def __init__(self, dim: int, k: int = 3, reduce: str = "max_logit"):
        super().__init__(dim)
        if k < 1:
            raise UserError(f"pooling.k={k} is no number of vectors: choose 1 or more")
        self.k, self.reduce = k, self.chosen("reduce", reduce, REDUCTIONS)
        self.project = nn.Linear(k * dim, dim) if reduce == "concat_project" else None

    def reduced(self, vectors: Tensor, attention: Tensor) -> Pooled:
        """Vectors [B, k, D] and their attention [B, k, N] -> Pooled."""
        if self.project is not None:
            return Pooled(linear(self.project, vectors.flatten(1)), attention)
        if self.reduce == "max_feature":
            return Pooled(vectors.amax(dim=1), attention)
        return Pooled(vectors.mean(dim=1), attention, vectors if self.reduce == "max_logit" and self.k > 1 else None)


def negative_square(x: Tensor, u: Tensor) -> Tensor:
    """-|x_j - u_i|^2 of x [B, N, D] and u [B or 1, k, D] -> [B, k, N]."""
    return 2 * torch.matmul(u, x.transpose(1, 2)) - x.square().sum(dim=-1).unsqueeze(1) - u.square().sum(dim=-1, keepdim=True)

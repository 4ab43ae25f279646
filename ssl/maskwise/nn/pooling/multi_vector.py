"""Base class of poolings into k vectors, and the reductions of k vectors to one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.nn.pooling.base import Pooling, check_choice, linear
from maskwise.nn.tokens import Pooled

Reduce = Literal["max_logit", "concat_project", "max_feature", "mean"]


class MultiVectorPooling(Pooling):
    """Pool into k vectors [B, k, D], each with an attention map, [B, k, N].

    `reduce` forms the pooled vector: "mean"; "max_feature", the maximum of each channel; "concat_project", a linear
    layer on the concatenation; "max_logit", the mean, with the k vectors in `Pooled.vectors` for a classifier that
    takes the largest of the k logits of each class. Raises UserError for k below 1 or another `reduce`.
    """

    gives_attention = True

    def __init__(self, dim: int, k: Count = 3, reduce: Reduce = "max_logit"):
        super().__init__(dim)
        if k < 1:
            raise UserError(f"pooling.k={k} is out of range: choose 1 or more vectors")
        self.k = k
        self.reduce = check_choice("reduce", reduce, get_args(Reduce))
        self.project = nn.Linear(k * dim, dim) if reduce == "concat_project" else None

    def reduced(self, vectors: Tensor, attention: Tensor) -> Pooled:
        """Reduce vectors [B, k, D] with attention [B, k, N] to Pooled."""
        if self.project is not None:
            return Pooled(linear(self.project, vectors.flatten(1)), attention)
        if self.reduce == "max_feature":
            return Pooled(vectors.amax(dim=1), attention)
        return Pooled(vectors.mean(dim=1), attention, vectors if self.reduce == "max_logit" and self.k > 1 else None)


def negative_squared_distance(x: Tensor, u: Tensor) -> Tensor:
    """Return -|x_j - u_i|^2 of x [B, N, D] and u [B or 1, k, D]: [B, k, N]."""
    return (
        2 * torch.matmul(u, x.transpose(1, 2))
        - x.square().sum(dim=-1).unsqueeze(1)
        - u.square().sum(dim=-1, keepdim=True)
    )

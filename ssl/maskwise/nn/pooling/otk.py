"""OTK: optimal transport between patches and learned references."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.bounds import Count, Positive
from maskwise.errors import UserError
from maskwise.nn.pooling.base import VARIANTS, Variant, check_choice, linear
from maskwise.nn.pooling.multi_vector import MultiVectorPooling, Reduce, negative_squared_distance
from maskwise.nn.pooling.nystrom import Nystrom
from maskwise.nn.tokens import Pooled

TEMPERATURE = 25.0  # of the released attention


class OTK(MultiVectorPooling):
    """Averages of the patches under the transport plan to k learned references (SimPool, eq. B13-B15).

    Attention: k times the plan of `iterations` of Sinkhorn's algorithm, each row's sum 1. Costs are squared distances
    averaged over channels, so `epsilon` does not depend on the width. With k = 1 it is the average of the patches.
    variant="released": a softmax over patches of <x, u> / 25, which the released code computes.

    With `anchors`, Nystrom features psi(x) of a Gaussian kernel of width `sigma` are averaged in place of the patches;
    if their number is not D, a linear layer without bias, initially orthogonal, maps the averages to D.
    Raises UserError for epsilon, iterations, anchors or sigma out of range.
    """

    def __init__(
        self,
        dim: int,
        k: Count = 3,
        reduce: Reduce = "max_logit",
        epsilon: Positive = 0.1,
        iterations: Count = 3,
        variant: Variant = "paper",
        anchors: Count | None = None,
        sigma: Positive = 1.0,
    ):
        super().__init__(dim, k, reduce)
        if epsilon <= 0 or iterations < 1:
            wrong = f"epsilon={epsilon}" if epsilon <= 0 else f"iterations={iterations}"
            raise UserError(f"pooling.{wrong} is out of range: choose an epsilon above 0 and at least one iteration")
        self.epsilon, self.iterations = epsilon, iterations
        self.variant = check_choice("variant", variant, VARIANTS)
        self.references = nn.Parameter(torch.randn(k, dim))
        self.anchors, self.sigma = anchors, sigma
        self.psi = None if anchors is None else Nystrom(dim, anchors, sigma)
        self.to_dim = None if anchors in (None, dim) else nn.Linear(anchors, dim, bias=False)
        if self.to_dim is not None:
            nn.init.orthogonal_(self.to_dim.weight)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Averages of features under the transport plan."""
        references = self.references.to(x.dtype)
        if self.variant == "released":
            attention = torch.softmax(torch.matmul(references, x.transpose(1, 2)) / TEMPERATURE, dim=-1)
        else:
            similarity = negative_squared_distance(x, references.unsqueeze(0))
            attention = sinkhorn(similarity / (self.dim * self.epsilon), self.iterations)
        return self.reduced(self.projected(torch.matmul(attention, self.features(x))), attention)

    def features(self, x: Tensor) -> Tensor:
        """Map patches [B, N, D] to psi(x) [B, N, anchors], or return them without anchors."""
        return x if self.psi is None else self.psi(x)

    def projected(self, averages: Tensor) -> Tensor:
        """Map averages of features [B, k, D or anchors] to [B, k, D]."""
        return averages if self.to_dim is None else linear(self.to_dim, averages)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Scale logits [B, k, N] to a plan whose rows sum to 1 and, on convergence, columns to k / N."""
    for _ in range(iterations):
        # The constant k / N of the columns cancels in the rows.
        logits = logits - logits.logsumexp(dim=1, keepdim=True)
        logits = logits - logits.logsumexp(dim=2, keepdim=True)
    return logits.exp()

"""Optimal transport between patches and learned references."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.pooling.nystrom import Nystrom
from maskwise.nn.pooling.pooling import VARIANTS, linear
from maskwise.nn.pooling.several import Several, negative_square
from maskwise.nn.tokens import Pooled

TEMPERATURE = 25.0  # of the released scores


class OTK(Several):
    """k references, each the average of the patches that optimal transport brings to it. Attention: k times the plan, each row's sum 1.

    The plan is Sinkhorn's after `iterations`, with squared distances (their mean over channels, so that `epsilon` does not
    depend on the width); its last step makes each reference's share equal, and its columns near k / N. With k = 1 it is the average.
    variant="released" is what the code behind the paper's figures computed: a softmax over patches of <x, u> / 25.

    What is averaged is psi(x): the identity, or with `anchors` the Nystrom features of a Gaussian kernel of width `sigma` (see Nystrom).
    There are as many features as anchors; where that is not D a linear layer without bias, learned and at first orthogonal, brings
    the average to D, so that psi's inner products are the kernel at the start (anchors below D) and are then learned.
    Weights: k D, and of psi anchors D, twice where there is a layer. Raises UserError for epsilon, iterations, anchors or sigma out of
    range. SimPool paper eq. B13-B15.
    """

    def __init__(
        self, dim: int, k: int = 3, reduce: str = "max_logit", epsilon: float = 0.1, iterations: int = 3, variant: str = "paper",
        anchors: int | None = None, sigma: float = 1.0,
    ):  # fmt: skip
        super().__init__(dim, k, reduce)
        if epsilon <= 0 or iterations < 1:
            wrong = f"epsilon={epsilon}" if epsilon <= 0 else f"iterations={iterations}"
            raise UserError(f"pooling.{wrong} is out of range: choose an epsilon above 0 and at least one iteration")
        self.epsilon, self.iterations, self.variant = epsilon, iterations, self.chosen("variant", variant, VARIANTS)
        self.references = nn.Parameter(torch.randn(k, dim))
        self.anchors, self.sigma = anchors, sigma
        self.psi = None if anchors is None else Nystrom(dim, anchors, sigma)
        self.to_dim = None if anchors in (None, dim) else nn.Linear(anchors, dim, bias=False)
        if self.to_dim is not None:
            nn.init.orthogonal_(self.to_dim.weight)

    def pool(self, x: Tensor, grid) -> Pooled:
        """Averages under the transport plan."""
        u = self.references.to(x.dtype)
        if self.variant == "released":
            attention = torch.softmax(torch.matmul(u, x.transpose(1, 2)) / TEMPERATURE, dim=-1)
        else:
            attention = sinkhorn(negative_square(x, u.unsqueeze(0)) / (self.dim * self.epsilon), self.iterations)
        return self.reduced(self.widened(torch.matmul(attention, self.features(x))), attention)

    def features(self, x: Tensor) -> Tensor:
        """psi: [B, N, D] -> [B, N, D or anchors]."""
        return x if self.psi is None else self.psi(x)

    def widened(self, z: Tensor) -> Tensor:
        """Averages of features [B, k, D or anchors] -> [B, k, D]."""
        return z if self.to_dim is None else linear(self.to_dim, z)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Logits [B, k, N] -> a plan whose rows sum to 1 and, when converged, its columns to k / N; in the log domain."""
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=1, keepdim=True)  # and the columns' k / N, which the rows take back
        logits = logits - logits.logsumexp(dim=2, keepdim=True)
    return logits.exp()

"""A Gaussian kernel's features at a few anchors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn.pooling.several import negative_square

STREAM = 61  # beside the streams of functional.draws
FLOOR = 1e-4  # what a smaller eigenvalue of k(W, W) counts as: its inverse root would carry rounding instead of anything seen


class Nystrom(nn.Module):
    """psi(x) = k(W, W)^(-1/2) k(W, x): patches [B, N, dim] -> [B, N, anchors], k(x, y) = exp(-|x - y|^2 / (2 dim sigma^2)).

    psi(x) . psi(y) is k(x, y) where x or y is an anchor, and its best approximation in their span elsewhere. Distances are means
    over channels, so that `sigma` is in units of a channel's deviation. The anchors W [anchors, dim] are learned and begin normal,
    a function of their shape alone. Eigenvalues of k(W, W) below 1e-4 count as 1e-4, so that anchors may coincide. On CUDA the
    decomposition makes the host wait once a call. Raises UserError for anchors below 1 and sigma not above 0.
    Williams and Seeger 2001; Mialon et al. 2021 (OTK), section 3; SimPool paper eq. B15.
    """

    def __init__(self, dim: int, anchors: int, sigma: float):
        super().__init__()
        if anchors < 1 or sigma <= 0:
            wrong = f"anchors={anchors}" if anchors < 1 else f"sigma={sigma}"
            raise UserError(f"pooling.{wrong} is out of range: choose at least one anchor and a sigma above 0")
        self.dim, self.sigma = dim, sigma
        uniform = draws.uniform(draws.mix(STREAM, dim), anchors * dim).clamp(1e-12, 1 - 1e-12)
        self.anchors = nn.Parameter((math.sqrt(2) * torch.erfinv(2 * uniform - 1)).view(anchors, dim).float())

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] in float32 or float64 -> [B, N, anchors]."""
        w = self.anchors.to(x.dtype).unsqueeze(0)
        return torch.matmul(self.kernel(w, x).transpose(1, 2), InverseRoot.apply(self.kernel(w, w)[0]))

    def kernel(self, w: Tensor, x: Tensor) -> Tensor:
        """k of w [1, A, dim] and x [B, N, dim]: [B, A, N]."""
        return (negative_square(x, w).clamp_max(0) / (2 * self.dim * self.sigma**2)).exp()


class InverseRoot(torch.autograd.Function):
    """A symmetric matrix [A, A] -> its inverse square root, eigenvalues raised to FLOOR.

    The gradient is written out in differences of the roots (Daleckii and Krein): torch's own, through the eigenvectors, divides by the
    gaps between eigenvalues and is not finite where two are equal.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        """Matrix -> its inverse square root."""
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return torch.matmul(vectors * values.clamp_min(FLOOR).rsqrt(), vectors.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given: Tensor) -> Tensor:
        """(f(a) - f(b)) / (a - b) for each pair of eigenvalues, f'(a) where they are equal, in their basis."""
        values, vectors = ctx.saved_tensors
        held = values.clamp_min(FLOOR)
        roots = held.sqrt()
        gaps = values[:, None] - values
        above = (values > FLOOR).to(values.dtype)
        moved = torch.where(gaps == 0, above[:, None] * above, (held[:, None] - held) / torch.where(gaps == 0, 1, gaps))
        slopes = -moved / (roots[:, None] * roots * (roots[:, None] + roots))
        inner = torch.matmul(vectors.T, torch.matmul((given + given.T) / 2, vectors))
        return torch.matmul(vectors, torch.matmul(slopes * inner, vectors.T))

"""Nystrom features of a Gaussian kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn.pooling.multi_vector import negative_squared_distance

STREAM = 61  # first word of the random key; see functional.keyed_random
FLOOR = 1e-4  # smallest eigenvalue of k(W, W); the inverse root of a smaller one would amplify rounding errors


class Nystrom(nn.Module):
    """Return psi(x) = k(W, W)^(-1/2) k(W, x) of patches: [B, N, dim] -> [B, N, anchors].

    k(x, y) = exp(-|x - y|^2 / (2 dim sigma^2)): distances are means over channels, so sigma is in units of a channel's
    standard deviation. psi(x) . psi(y) equals k(x, y) where x or y is an anchor and approximates it elsewhere.
    The anchors W [anchors, dim] are learned; their initial values are normal and depend on their shape alone.
    Eigenvalues of k(W, W) are raised to 1e-4, so anchors may coincide. On CUDA, `eigh` synchronizes once per call.
    Raises UserError for anchors below 1 or sigma not above 0.
    Williams and Seeger 2001; Mialon et al. 2021 (OTK), section 3; SimPool, eq. B15.
    """

    def __init__(self, dim: int, anchors: int, sigma: float):
        super().__init__()
        if anchors < 1 or sigma <= 0:
            wrong = f"anchors={anchors}" if anchors < 1 else f"sigma={sigma}"
            raise UserError(f"pooling.{wrong} is out of range: choose at least one anchor and a sigma above 0")
        self.dim, self.sigma = dim, sigma
        uniform = keyed_random.uniform(keyed_random.make_key(STREAM, dim), anchors * dim).clamp(1e-12, 1 - 1e-12)
        self.anchors = nn.Parameter((math.sqrt(2) * torch.erfinv(2 * uniform - 1)).view(anchors, dim).float())

    def forward(self, x: Tensor) -> Tensor:
        """Map patches [B, N, dim] in float32 or float64 to features [B, N, anchors]."""
        w = self.anchors.to(x.dtype).unsqueeze(0)
        return torch.matmul(self.kernel(w, x).transpose(1, 2), InverseRoot.apply(self.kernel(w, w)[0]))

    def kernel(self, w: Tensor, x: Tensor) -> Tensor:
        """Return k of w [1, A, dim] and x [B, N, dim]: [B, A, N]."""
        return (negative_squared_distance(x, w).clamp_max(0) / (2 * self.dim * self.sigma**2)).exp()


class InverseRoot(torch.autograd.Function):
    """Inverse square root of a symmetric matrix [A, A], eigenvalues raised to FLOOR.

    The gradient uses divided differences of the roots (Daleckii and Krein), since torch's own, through eigenvectors,
    divides by the gaps between eigenvalues and is not finite where two are equal.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        """Return the inverse square root."""
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return torch.matmul(vectors * values.clamp_min(FLOOR).rsqrt(), vectors.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        """Weight the gradient, in the eigenbasis, by (f(a) - f(b)) / (a - b), or f'(a) for equal eigenvalues."""
        values, vectors = ctx.saved_tensors
        raised = values.clamp_min(FLOOR)
        roots = raised.sqrt()
        gaps = values[:, None] - values
        above = (values > FLOOR).to(values.dtype)
        quotient = (raised[:, None] - raised) / torch.where(gaps == 0, 1, gaps)
        ratio = torch.where(gaps == 0, above[:, None] * above, quotient)
        slopes = -ratio / (roots[:, None] * roots * (roots[:, None] + roots))
        inner = torch.matmul(vectors.T, torch.matmul((grad + grad.T) / 2, vectors))
        return torch.matmul(vectors, torch.matmul(slopes * inner, vectors.T))

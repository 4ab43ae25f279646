"""Random patches and poolings in float64, for tests against closed forms and other libraries."""

import math

import torch

from maskwise.nn import POOLINGS


def patches(batch=3, count=49, dim=16, seed=0):
    """Return random patches [batch, count, dim]."""
    return torch.randn(batch, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(name, dim=16, **options):
    """Return a pooling in evaluation mode whose parameters differ from their initial values, single exponents aside."""
    torch.manual_seed(0)
    pooling = POOLINGS[name](dim, **options).double().eval()
    with torch.no_grad():
        for parameter in pooling.parameters():
            if name not in ("gem", "lse"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return pooling


def map_of(x):
    """Arrange patches [B, N, D] of a square grid as a map [B, D, h, w]."""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side))

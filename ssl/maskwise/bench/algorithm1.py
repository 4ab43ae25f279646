"""Generalized pooling framework of the SimPool paper (Algorithm 1); `table1` writes the poolings of its Table 1 in it.

Channels come last: X is [B, N, D], U [B, k, D], Q [B, k, n], K [B, N, n], S and A [B, k, N], V [B, N, n'].
A part is a plain function that closes over its weights. Three parts read more than in the paper: keys and values also
read U (a class token among the tokens), the value map reads Q (SE, CBAM), and the update reads the previous U (GRU,
residual connections).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwise.functional.power_means import log_mean_exp, power_mean


def identity(x: Tensor, *_) -> Tensor:
    """Return the first argument."""
    return x


@dataclass(frozen=True)
class Parts:
    """Parts of a pooling, in the notation of Algorithm 1."""

    init: Callable[[Tensor], Tensor]  # X -> U
    attention: Callable[[Tensor | None, Tensor], Tensor]  # h: S, X -> A
    query: Callable[[Tensor], Tensor] = identity  # phi_Q: U -> Q
    key: Callable[[Tensor, Tensor], Tensor] = identity  # phi_K: X, U -> K
    # s: Q, K -> S; None for an attention that is a function of X alone
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None
    value: Callable[[Tensor, Tensor, Tensor], Tensor] = identity  # phi_V: X, Q, U -> V
    f: Callable[[Tensor, Tensor], Tensor] = torch.matmul  # A, V -> Z = f^-1(f(V) A)
    features: Callable[[Tensor], Tensor] = identity  # phi_X: X -> X
    update: Callable[[Tensor, Tensor], Tensor] = identity  # phi_U: Z, U -> U
    iterations: int = 1  # T
    constant_keys: bool = False  # keys and values do not change between iterations and are computed once


def pool(x: Tensor, *steps: Parts) -> tuple[Tensor, Tensor]:
    """Algorithm 1: X [B, N, D] -> U [B, k, D'] and the last A [B, k, N].

    Several steps follow one another, each with its own iterations and parameters; `init` is that of the first.
    """
    u, a, k, v = steps[0].init(x), x, x, x
    for parts in steps:
        for t in range(parts.iterations):
            map_patches = t == 0 or not parts.constant_keys
            q = parts.query(u)
            k = parts.key(x, u) if map_patches else k
            s = None if parts.similarity is None else parts.similarity(q, k)
            a = parts.attention(s, x)
            v = parts.value(x, q, u) if map_patches else v
            z = parts.f(a, v)
            x, u = parts.features(x), parts.update(z, u)
    return u, a


# Initialization


def average(x: Tensor) -> Tensor:
    """U = GAP(X): [B, 1, D]."""
    return x.mean(dim=1, keepdim=True)


# Similarities


def dot(q: Tensor, k: Tensor) -> Tensor:
    """<q, k>."""
    return torch.matmul(q, k.transpose(1, 2))


def euclidean(q: Tensor, k: Tensor) -> Tensor:
    """-|q - k|^2."""
    return 2 * dot(q, k) - q.square().sum(dim=-1, keepdim=True) - k.square().sum(dim=-1).unsqueeze(1)


def split(heads: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return functions that spread a query over heads on a block diagonal and gather their blocks (eq. B49)."""

    def spread(q: Tensor) -> Tensor:
        blocks = torch.eye(heads, dtype=q.dtype, device=q.device).repeat_interleave(q.shape[-1] // heads, dim=1)
        return q * blocks  # [B, 1, D] -> [B, heads, D]

    def gather(z: Tensor, *_) -> Tensor:
        return z.unflatten(-1, (heads, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1).unsqueeze(1)

    return spread, gather


# Attention


def uniform(s: Tensor | None, x: Tensor) -> Tensor:
    """1 / N."""
    return x.new_full((len(x), 1, x.shape[1]), 1 / x.shape[1])


def softmax(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax over patches of S / scale."""
    return lambda s, x: torch.softmax(s / scale, dim=-1)


# Pooling functions f, each as one function of attention and values: a root in one piece keeps its precision


def power(gamma: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x) = x^gamma, for values of at least 0; inf is the maximum."""
    return lambda a, v: power_mean(a, v, gamma)


def exponential(r: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x) = exp(r x)."""
    return lambda a, v: log_mean_exp(a, v, r)


def maximum(a: Tensor, v: Tensor) -> Tensor:
    """The limit of x^gamma, for values of any sign."""
    return v.amax(dim=1, keepdim=True)

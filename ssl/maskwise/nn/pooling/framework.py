"""The pooling framework of the SimPool paper: its Algorithm 1 and the parts that Table 1 puts into it.

Tokens come last: X is [B, N, D], U [B, k, D], Q [B, k, n], K [B, N, n], S and A [B, k, N], V [B, N, n'].
A part is a plain function; what it learns it closes over. In three places practice asks for more than the paper prints:
keys and values may hold U itself (a class token among the tokens), a value map may read Q (squeeze-and-excitation,
CBAM), and an update may read the previous U (GRU, residuals). `landscape.py` writes every row of Table 1 in these parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional.means import log_mean_exp, power_mean


def same(x: Tensor, *_) -> Tensor:
    """The identity."""
    return x


@dataclass(frozen=True)
class Parts:
    """What makes a pooling: initialisation, query, key and value maps, similarity, attention, pooling function, output maps, iterations T."""

    init: Callable[[Tensor], Tensor]  # X -> U
    attention: Callable[[Tensor | None, Tensor], Tensor]  # h: S, X -> A
    query: Callable[[Tensor], Tensor] = same  # phi_Q: U -> Q
    key: Callable[[Tensor, Tensor], Tensor] = same  # phi_K: X, U -> K
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None  # s: Q, K -> S; None where the attention looks at X alone
    value: Callable[[Tensor, Tensor, Tensor], Tensor] = same  # phi_V: X, Q, U -> V
    f: Callable[[Tensor, Tensor], Tensor] = torch.matmul  # A, V -> Z = f^-1(f(V) A)
    features: Callable[[Tensor], Tensor] = same  # phi_X: X -> X
    update: Callable[[Tensor, Tensor], Tensor] = same  # phi_U: Z, U -> U
    iterations: int = 1
    fixed: bool = False  # X stands still and neither keys nor values look at U: they are mapped once


def pool(x: Tensor, *steps: Parts) -> tuple[Tensor, Tensor]:
    """Algorithm 1: X [B, N, D] -> U [B, k, D'] and the last A [B, k, N].

    Several `steps` follow each other, each for its own `iterations`; only the first one's `init` is asked (separate
    parameters an iteration, where one step shares them).
    """
    u, a, k, v = steps[0].init(x), x, x, x
    for parts in steps:
        for t in range(parts.iterations):
            again = t == 0 or not parts.fixed
            q = parts.query(u)
            k = parts.key(x, u) if again else k
            s = None if parts.similarity is None else parts.similarity(q, k)
            a = parts.attention(s, x)
            v = parts.value(x, q, u) if again else v
            z = parts.f(a, v)
            x, u = parts.features(x), parts.update(z, u)
    return u, a


# initialisations


def average(x: Tensor) -> Tensor:
    """U = GAP(X): [B, 1, D]."""
    return x.mean(dim=1, keepdim=True)


def by_energy(x: Tensor) -> Tensor:
    """U = X diag(X^T X), its weights shared out to a sum of 1: [B, 1, D]."""
    energy = x.square().sum(dim=-1).unsqueeze(1)
    return torch.matmul(energy / energy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny), x)


# similarities


def dot(q: Tensor, k: Tensor) -> Tensor:
    """<q, k>."""
    return torch.matmul(q, k.transpose(1, 2))


def euclidean(q: Tensor, k: Tensor) -> Tensor:
    """-|q - k|^2."""
    return 2 * dot(q, k) - q.square().sum(dim=-1, keepdim=True) - k.square().sum(dim=-1).unsqueeze(1)


def cosine(q: Tensor, k: Tensor) -> Tensor:
    """<q, k> / |q| |k|."""
    return dot(F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6))


def split(heads: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Multi-head attention as `heads` queries (eq. B49): a query's blocks on a diagonal, and the same blocks of what they gather."""

    def spread(q: Tensor) -> Tensor:
        blocks = torch.eye(heads, dtype=q.dtype, device=q.device).repeat_interleave(q.shape[-1] // heads, dim=1)
        return q * blocks  # [B, 1, D] -> [B, heads, D]

    def gather(z: Tensor, *_) -> Tensor:
        return z.unflatten(-1, (heads, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1).unsqueeze(1)

    return spread, gather


# attentions


def uniform(s: Tensor | None, x: Tensor) -> Tensor:
    """1 / N."""
    return x.new_full((len(x), 1, x.shape[1]), 1 / x.shape[1])


def softmax(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Softmax over patches of S / scale."""
    return lambda s, x: torch.softmax(s / scale, dim=-1)


def sigmoid(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Sigmoid of S / scale, each row then shared out to a sum of 1."""

    def attention(s: Tensor, x: Tensor) -> Tensor:
        opened = torch.sigmoid(s / scale)
        return opened / opened.sum(dim=-1, keepdim=True)

    return attention


# pooling functions, as one function of attention and values each: a root taken in one piece keeps its precision


def power(gamma: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x) = x^gamma, for values of at least 0; inf is the maximum."""
    return lambda a, v: power_mean(a, v, gamma)


def exponential(r: float | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x) = exp(r x)."""
    return lambda a, v: log_mean_exp(a, v, r)


def maximum(a: Tensor, v: Tensor) -> Tensor:
    """The limit of x^gamma, for values of any sign."""
    return v.amax(dim=1, keepdim=True)


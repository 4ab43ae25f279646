"""What every pooling of patches shares: how it is given tokens, and the precision that it computes in."""

from __future__ import annotations

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.tokens import Pooled, Tokens

VARIANTS = ("paper", "released")


class Pooling(nn.Module):
    """Tokens, [B, N, D] or [B, D, H, W] -> Pooled, by `pool` of a subclass.

    `pool(x [B, N, D], grid or None)` is called in float32 or better with autocast off; vectors come back in the type of
    the tokens, attention as it was computed. Maps are flattened row by row. A row keeps its arguments as attributes.
    """

    needs: frozenset[str] = frozenset()
    gives_attention = False

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, tokens: Tokens | Tensor) -> Pooled:
        """Tokens, [B, N, D] or [B, D, H, W] -> Pooled."""
        x, grid = (tokens.patches, tokens.grid) if isinstance(tokens, Tokens) else (tokens, None)
        if x.ndim == 4:
            x, grid = x.flatten(2).transpose(1, 2), tuple(x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):  # powers, exponentials and sums of half precision lose too much (pooling.md 1.9)
            pooled = self.pool(x if x.dtype == torch.float64 else x.float(), grid)
        vectors = None if pooled.vectors is None else pooled.vectors.to(x.dtype)
        return Pooled(pooled.vector.to(x.dtype), pooled.attention, vectors)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Patches [B, N, D] in float32 or float64 -> Pooled."""
        raise NotImplementedError

    def arguments(self) -> dict[str, object]:
        """What this pooling was built with, width included: the keywords that build another."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def chosen(self, key: str, value: str, choices: tuple[str, ...]) -> str:
        """The value of a key that is one of few words; raises UserError for another."""
        if value not in choices:
            raise UserError(f"pooling.{key}={value!r} is unknown: choose {' or '.join(choices)}")
        return value

    def heads_of(self, count: int) -> int:
        """A number of heads that divides the width; raises UserError for another."""
        if count < 1 or self.dim % count:
            raise UserError(f"pooling.num_heads={count} does not divide the width {self.dim}: choose a divisor")
        return count


def as_map(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Patches [B, N, D] -> a map [B, D, H, W]; without a grid N must be a square, otherwise raises UserError."""
    if grid is None:
        side = math.isqrt(x.shape[1])
        if side * side != x.shape[1]:
            raise UserError(f"this pooling looks at neighbours and {x.shape[1]} patches without a grid are no square: give it Tokens or a map [B, D, H, W]")
        grid = (side, side)
    return x.transpose(1, 2).unflatten(2, grid)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the type of x, whatever its weights are kept in."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def normed(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm in the type of x, whatever its weights are kept in."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def gate(dim: int, hidden: int, bias: bool = True) -> nn.Sequential:
    """The bottleneck of squeeze-and-excitation: dim -> hidden, ReLU, hidden -> dim."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, dim, bias=bias))


def gated(layers: nn.Sequential, x: Tensor) -> Tensor:
    """What `gate` makes of x [..., D], before a sigmoid."""
    return linear(layers[2], F.relu(linear(layers[0], x)))

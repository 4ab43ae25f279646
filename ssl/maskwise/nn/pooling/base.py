"""Base class of all poolings, with the layers and checks that they share."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.nn.tokens import Pooled, Tokens

Variant = Literal["paper", "released"]
VARIANTS = get_args(Variant)


class Pooling(nn.Module, ABC):
    """Pool Tokens, [B, N, D] or [B, D, H, W] into one vector per image.

    A subclass takes the width D as its first argument, stores every other argument as an attribute of the same name
    and implements `pool`. Class attributes: `needs`, the optional fields of Tokens that it reads; `reads_patches`,
    False if the class token is all it reads of the tokens; `gives_attention`, whether it returns an attention map that
    a masking can follow.
    """

    needs: frozenset[str] = frozenset()
    reads_patches = True
    k = 1  # vectors per image
    gives_attention = False

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, tokens: Tokens | Tensor) -> Pooled:
        """Return the pooled vector [B, D] in the dtype of the tokens, and the attention in that of `pool`."""
        x, grid = (tokens.patches, tokens.grid) if isinstance(tokens, Tokens) else (tokens, None)
        if x.ndim == 4:
            x, grid = x.flatten(2).transpose(1, 2), tuple(x.shape[2:])
        # Half precision loses too much in powers, exponentials and long sums.
        with autocast_off(x):
            pooled = self.pool(at_least_float32(x), grid)
        vectors = None if pooled.vectors is None else pooled.vectors.to(x.dtype)
        return Pooled(pooled.vector.to(x.dtype), pooled.attention, vectors)

    @abstractmethod
    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Pool patches [B, N, D], row-major on the grid, in float32 or float64 with autocast off."""

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments that construct an equal pooling, width included."""
        options = {}
        for value in vars(self).values():
            if is_dataclass(value):
                options.update(asdict(value))
        names = inspect.signature(type(self)).parameters
        return {name: options[name] if name in options else getattr(self, name) for name in names}


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the value of a key if it is one of the choices; raises UserError otherwise."""
    if value not in choices:
        raise UserError(f"pooling.{key}={value!r} is unknown: choose {' or '.join(choices)}")
    return value


def check_count(key: str, value: int) -> int:
    """Return a number of at least 1; raises UserError for a smaller one."""
    if value < 1:
        raise UserError(f"pooling.{key}={value} is out of range: choose 1 or more")
    return value


def check_heads(num_heads: int, dim: int) -> int:
    """Return a number of heads that divides the width; raises UserError otherwise."""
    if num_heads < 1 or dim % num_heads:
        raise UserError(f"pooling.num_heads={num_heads} does not divide the width {dim}: choose a divisor")
    return num_heads


def as_map(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Reshape patches [B, N, D] to a map [B, D, H, W].

    Without a grid, raises UserError unless N is a square.
    """
    if grid is None:
        side = math.isqrt(x.shape[1])
        if side * side != x.shape[1]:
            raise UserError(
                f"this pooling reads neighboring patches and {x.shape[1]} patches without a grid form no square: "
                "pass Tokens or a map [B, D, H, W]"
            )
        grid = (side, side)
    return x.transpose(1, 2).unflatten(2, grid)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer in the dtype of x."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a LayerNorm in the dtype of x."""
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def bottleneck_mlp(dim: int, hidden: int, bias: bool = True) -> nn.Sequential:
    """Build the MLP of squeeze-and-excitation: dim -> hidden, ReLU, hidden -> dim."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, dim, bias=bias))


def apply_mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """Apply a `bottleneck_mlp` to x [..., D] in the dtype of x."""
    return linear(mlp[2], F.relu(linear(mlp[0], x)))

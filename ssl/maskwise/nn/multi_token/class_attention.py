"""Class attention of a few tokens to many pixels, followed by a grouped MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.multi_token.options import KEYS, AttentionOptions, Keys

NORM_EPS = 1e-6
# `place` of each use of KeyedDropout in a block.
ATTENTION_DROPOUT, OUTPUT_DROPOUT, MLP_DROPOUT = 0, 1, 2


class ClassAttention(nn.Module):
    """Multi-head attention with tokens as queries, in at least float32 for the softmax; biases everywhere.

    keys: "tokens+pixels" (the released code) or "pixels" (MAP, algorithm 1). talking: heads are mixed before and after
    the softmax with a residual, so rows need not sum to 1. Raises UserError if heads do not divide `embed`.
    """

    def __init__(
        self,
        dim: int,
        embed: int,
        heads: int,
        talking: bool = False,
        keys: Keys = "tokens+pixels",
        dropout: float = 0.0,
    ):
        super().__init__()
        if embed % heads:
            raise UserError(f"map: heads={heads} does not divide embed={embed}; choose a divisor")
        if keys not in KEYS:
            raise UserError(f"map: keys={keys!r} is unknown: choose tokens+pixels or pixels")
        self.dim, self.embed, self.heads, self.keys = dim, embed, heads, keys
        self.q, self.k, self.v = (nn.Linear(dim, embed) for _ in range(3))
        self.proj = nn.Linear(embed, dim)
        self.before, self.after = (nn.Linear(heads, heads), nn.Linear(heads, heads)) if talking else (None, None)
        self.drop = KeyedDropout(dropout)

    def forward(self, x: Tensor, num_tokens: int, drop_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend from the first T = num_tokens of normalized x [B, T + N, dim] to the keys.

        drop_key: int64 [B], see KeyedDropout. Returns the update of the tokens [B, T, dim] and the attention on pixels,
        [B, heads, T, N], as the softmax gave it.
        """
        sources = x if self.keys == "tokens+pixels" else x[:, num_tokens:]
        q, k, v = self._split(self.q(x[:, :num_tokens])), self._split(self.k(sources)), self._split(self.v(sources))
        logits = torch.matmul(q * (self.embed // self.heads) ** -0.5, k.transpose(2, 3))
        if self.before is not None:
            logits = logits + mix_heads(self.before, logits)
        with autocast_off(x):
            attention = torch.softmax(at_least_float32(logits), dim=-1)
        weights = attention.to(v.dtype)
        if self.after is not None:
            weights = weights + mix_heads(self.after, weights)
        weights = self.drop(weights, drop_key, ATTENTION_DROPOUT)
        update = self.proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        num_pixels = x.shape[1] - num_tokens
        return self.drop(update, drop_key, OUTPUT_DROPOUT), attention[..., sources.shape[1] - num_pixels :]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GroupedMLP(nn.Module):
    """Two linear layers in `groups` blocks of channels, with ReLU and a channel shuffle between (ShuffleNet).

    Raises UserError if the groups do not divide the channels.
    """

    def __init__(self, dim: int, ratio: float = 4.0, groups: int = 2, dropout: float = 0.0):
        super().__init__()
        hidden = int(dim * ratio)
        if dim % groups or hidden % groups:
            raise UserError(
                f"map: mlp_groups={groups} does not divide the {dim} and {hidden} channels of the MLP; choose a divisor"
            )
        self.groups = groups
        self.fc1, self.fc2 = nn.Conv1d(dim, hidden, 1, groups=groups), nn.Conv1d(hidden, dim, 1, groups=groups)
        self.drop = KeyedDropout(dropout)

    def forward(self, x: Tensor, drop_key: Tensor | None = None) -> Tensor:
        """Transform tokens [B, T, dim]."""
        hidden = self.drop(F.relu(self.fc1(x.transpose(1, 2))), drop_key, MLP_DROPOUT)
        return self.fc2(shuffle_channels(hidden, self.groups)).transpose(1, 2)


class ClassAttentionBlock(nn.Module):
    """Update tokens [B, T, dim] by ClassAttention and GroupedMLP, each after a LayerNorm (eps 1e-6) with a residual.

    The first LayerNorm applies to tokens and pixels together; the pixels are not updated.
    """

    def __init__(self, dim: int, heads: int, *, options: AttentionOptions = AttentionOptions(), dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = ClassAttention(dim, options.embed or dim, heads, options.talking, options.keys, dropout)
        self.mlp = GroupedMLP(dim, options.mlp_ratio, options.mlp_groups, dropout)

    def forward(self, tokens: Tensor, pixels: Tensor, drop_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, T, dim] and their attention on pixels [B, N, dim]: [B, heads, T, N]."""
        normalized = self.norm1(torch.cat([tokens, pixels], dim=1))
        update, attention = self.attention(normalized, tokens.shape[1], drop_key)
        tokens = tokens + update
        return tokens + self.mlp(self.norm2(tokens), drop_key), attention


def mix_heads(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer over the heads of [B, heads, T, K]."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave channels of [B, C, T] over blocks: channel i becomes number i // groups of block i mod groups."""
    return x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)

"""A few tokens that look at many: attention with the tokens as queries, then an MLP in groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.dropout import KeyedDropout

NORM_EPS = 1e-6


class ClassAttention(nn.Module):
    """Normalised [tokens; pixels] [B, T + N, dim] -> what attention adds to the tokens [B, T, dim], and its pixel columns [B, heads, T, N].

    Queries are the T tokens, keys and values "tokens+pixels" (the reference) or "pixels" (MAP algorithm 1); biases everywhere.
    talking: heads are mixed before and after the softmax, each mixture added to what it is made of, so that rows need not
    sum to 1 (the columns handed out are those before the second). Softmax in float32 at least. pooling.md 3.1.
    Raises UserError where heads do not divide `embed`.
    """

    def __init__(self, dim: int, embed: int, heads: int, talking: bool = False, keys: str = "tokens+pixels", dropout: float = 0.0):
        super().__init__()
        if embed % heads:
            raise UserError(f"map: heads={heads} does not divide embed={embed}; choose a divisor")
        if keys not in ("tokens+pixels", "pixels"):
            raise UserError(f"map: keys={keys!r} is unknown: choose tokens+pixels or pixels")
        self.dim, self.embed, self.heads, self.keys = dim, embed, heads, keys
        self.q, self.k, self.v = (nn.Linear(dim, embed) for _ in range(3))
        self.proj = nn.Linear(embed, dim)
        self.before, self.after = (nn.Linear(heads, heads), nn.Linear(heads, heads)) if talking else (None, None)
        self.drop = KeyedDropout(dropout)

    def forward(self, x: Tensor, tokens: int, drop_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T + N, dim] with T = tokens -> ([B, T, dim], [B, heads, T, N]); drop_key int64 [B], see KeyedDropout."""
        seen = x if self.keys == "tokens+pixels" else x[:, tokens:]
        q, k, v = (self._split(layer(each)) for layer, each in ((self.q, x[:, :tokens]), (self.k, seen), (self.v, seen)))
        logits = torch.matmul(q * (self.embed // self.heads) ** -0.5, k.transpose(2, 3))
        if self.before is not None:
            logits = logits + mixed(self.before, logits)
        with torch.autocast(x.device.type, enabled=False):
            attention = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        weights = attention.to(v.dtype)
        if self.after is not None:
            weights = weights + mixed(self.after, weights)
        added = self.proj(torch.matmul(self.drop(weights, drop_key, 0), v).transpose(1, 2).flatten(2))
        return self.drop(added, drop_key, 1), attention[..., seen.shape[1] - (x.shape[1] - tokens) :]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GroupedMLP(nn.Module):
    """Tokens [B, T, dim] -> [B, T, dim]: two linear layers, each in `groups` blocks of channels, ReLU and a shuffle of channels between.

    The shuffle deals channels out over the groups: hidden channel i goes to block i mod groups. ShuffleNet; pooling.md 3.1.
    Raises UserError where the groups do not divide the channels.
    """

    def __init__(self, dim: int, ratio: float = 4.0, groups: int = 2, dropout: float = 0.0):
        super().__init__()
        hidden = int(dim * ratio)
        if dim % groups or hidden % groups:
            raise UserError(f"map: mlp_groups={groups} does not divide the {dim} and {hidden} channels of the MLP; choose a divisor")
        self.groups = groups
        self.fc1, self.fc2 = nn.Conv1d(dim, hidden, 1, groups=groups), nn.Conv1d(hidden, dim, 1, groups=groups)
        self.drop = KeyedDropout(dropout)

    def forward(self, x: Tensor, drop_key: Tensor | None = None) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        hidden = self.drop(F.relu(self.fc1(x.transpose(1, 2))), drop_key, 2)
        return self.fc2(shuffled(hidden, self.groups)).transpose(1, 2)


class ClassAttentionBlock(nn.Module):
    """Tokens [B, T, dim] and pixels [B, N, dim] -> tokens [B, T, dim] and the attention on pixels [B, heads, T, N].

    LayerNorm (eps 1e-6) of both together, ClassAttention, LayerNorm, GroupedMLP, each added to the tokens; pixels stay. pooling.md 3.1.
    """

    def __init__(
        self, dim: int, embed: int, heads: int, *, talking: bool = False, keys: str = "tokens+pixels", mlp_ratio: float = 4.0, mlp_groups: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = ClassAttention(dim, embed, heads, talking, keys, dropout)
        self.mlp = GroupedMLP(dim, mlp_ratio, mlp_groups, dropout)

    def forward(self, tokens: Tensor, pixels: Tensor, drop_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class."""
        added, attention = self.attention(self.norm1(torch.cat([tokens, pixels], dim=1)), tokens.shape[1], drop_key)
        tokens = tokens + added
        return tokens + self.mlp(self.norm2(tokens), drop_key), attention


def mixed(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over the heads of [B, heads, T, K]."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels of [B, C, T] dealt out over `groups` blocks: channel i becomes number i // groups of block i mod groups."""
    return x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)

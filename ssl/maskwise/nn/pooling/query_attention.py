"""Attention of a learned query to the patches, like that of a CLS token: a ViT layer, CaiT blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count, Positive
from maskwise.nn.pooling.base import (
    VARIANTS,
    Pooling,
    Variant,
    check_choice,
    check_count,
    check_heads,
    layer_norm,
    linear,
)
from maskwise.nn.tokens import Pooled

LAYER_SCALE = 1e-5


class ViT(Pooling):
    """Multi-head attention of a learned query to the patches (SimPool, eq. B45-B48). Attention: [B, heads, N].

    variant="released": the query is among the keys, so attention sums to less than 1, and heads are concatenated.
    variant="paper": keys are patches alone (sum 1), followed by the output projection and an MLP.
    Raises UserError for heads that do not divide the width.
    """

    gives_attention = True

    def __init__(self, dim: int, num_heads: Count = 4, variant: Variant = "released"):
        super().__init__(dim)
        self.num_heads = check_heads(num_heads, dim)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.wq, self.wk, self.wv = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        with_mlp = variant == "paper"
        self.proj = nn.Linear(dim, dim) if with_mlp else None
        self.fc1 = nn.Linear(dim, 4 * dim) if with_mlp else None
        self.fc2 = nn.Linear(4 * dim, dim) if with_mlp else None

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Attend with the learned query."""
        query = self.query.to(x.dtype).expand(len(x), -1, -1)
        if self.proj is None:
            z, attention = attend(self, query, torch.cat([query, x], dim=1), self.num_heads)
            return Pooled(z, attention[..., 1:])
        z, attention = attend(self, query, x, self.num_heads)
        return Pooled(linear(self.fc2, F.relu(linear(self.fc1, linear(self.proj, z)))), attention)


class CaiT(Pooling):
    """`blocks` of class attention and MLP on a learned token, patches unchanged (SimPool, appendix B.5; CaiT).

    Attention: the last block's, [B, heads, N]; it sums to less than 1, since the token is among the keys. `layer_scale`
    is the initial scale of the residual branches; with CaiT's 1e-5 the token depends on the image after many steps.
    Raises UserError for heads that do not divide the width or blocks below 1.
    """

    gives_attention = True

    def __init__(self, dim: int, num_heads: Count = 4, blocks: Count = 1, layer_scale: Positive = LAYER_SCALE):
        super().__init__(dim)
        self.blocks = check_count("blocks", blocks)
        self.num_heads, self.layer_scale = check_heads(num_heads, dim), layer_scale
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.cls_token, std=0.02)
        self.layers = nn.ModuleList(QueryAttention(dim, num_heads, layer_scale) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def pool(self, x: Tensor, grid: tuple[int, int] | None) -> Pooled:
        """Update the token by all blocks."""
        token, attention = self.cls_token.to(x.dtype).expand(len(x), -1, -1), None
        for layer in self.layers:
            token, attention = layer(token, x)
        # CaiT normalizes the patches too, without effect on the token.
        return Pooled(layer_norm(self.norm, token[:, 0]), attention)


class QueryAttention(nn.Module):
    """Class-attention block of CaiT: token [B, 1, D] and patches [B, N, D] -> token, attention [B, heads, N]."""

    def __init__(self, dim: int, num_heads: int, layer_scale: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        for layer in (self.wq, self.wk, self.wv, self.proj, self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, token: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the updated token and its attention to the patches."""
        tokens = layer_norm(self.norm1, torch.cat([token, x], dim=1))
        z, attention = attend(self, tokens[:, :1], tokens, self.num_heads)
        token = token + self.gamma_1.to(x.dtype) * linear(self.proj, z).unsqueeze(1)
        hidden = F.gelu(linear(self.fc1, layer_norm(self.norm2, token)))
        return token + self.gamma_2.to(x.dtype) * linear(self.fc2, hidden), attention[..., 1:]


def attend(layers: ViT | QueryAttention, query: Tensor, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attend with one query [B, 1, D] to tokens [B, T, D]: concatenated heads [B, D], attention [B, heads, T].

    Uses (W_K t)^T q = t^T (W_K^T q), and W_V on the averages since weights sum to 1, so no token is projected.
    """
    head_dim = query.shape[-1] // heads
    key_weight, key_bias = layers.wk.weight.to(query.dtype), layers.wk.bias.to(query.dtype)
    value_weight, value_bias = layers.wv.weight.to(query.dtype), layers.wv.bias.to(query.dtype)
    projected = linear(layers.wq, query[:, 0]).unflatten(-1, (heads, 1, head_dim))
    query_on_tokens = torch.matmul(projected, key_weight.unflatten(0, (heads, head_dim))).squeeze(2)  # [B, heads, D]
    # The bias of the keys cancels in the softmax; adding it gives the parameter a gradient.
    shift = torch.matmul(projected, key_bias.view(heads, head_dim, 1)).squeeze(-1)
    logits = (torch.matmul(query_on_tokens, tokens.transpose(1, 2)) + shift) / math.sqrt(head_dim)
    attention = torch.softmax(logits, dim=-1)
    averages = torch.matmul(attention, tokens).unsqueeze(2)  # [B, heads, 1, D]
    values = torch.matmul(averages, value_weight.unflatten(0, (heads, head_dim)).transpose(1, 2))
    return values.squeeze(2).flatten(1) + value_bias, attention

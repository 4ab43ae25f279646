"""A learned query that attends to the patches, as a transformer's class token: one layer of ViT, blocks of CaiT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.pooling.pooling import VARIANTS, Pooling, linear, normed
from maskwise.nn.tokens import Pooled

LAYER_SCALE = 1e-5


class ViT(Pooling):
    """Multi-head attention of a learned query over the patches. Attention: [B, heads, N].

    variant="released" attends to itself as well (so that a row's sum is below 1) and gives the heads side by side; "paper"
    attends to patches alone (sum 1) and adds the output map and an MLP. Weights: 3 D^2 + 4 D ("paper": 9 D^2 + 6 D more).
    Raises UserError for heads that do not divide the width. SimPool paper eq. B45-B48, simplified as there.
    """

    gives_attention = True

    def __init__(self, dim: int, num_heads: int = 4, variant: str = "released"):
        super().__init__(dim)
        self.num_heads, self.variant = self.heads_of(num_heads), self.chosen("variant", variant, VARIANTS)
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.wq, self.wk, self.wv = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj, self.fc1, self.fc2 = (nn.Linear(dim, dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)) if variant == "paper" else (None, None, None)

    def pool(self, x: Tensor, grid) -> Pooled:
        """What the query gathers."""
        u = self.query.to(x.dtype).expand(len(x), -1, -1)
        if self.proj is None:
            z, attention = attend(self, u, torch.cat([u, x], dim=1), self.num_heads)
            return Pooled(z, attention[..., 1:])
        z, attention = attend(self, u, x, self.num_heads)
        return Pooled(linear(self.fc2, F.relu(linear(self.fc1, linear(self.proj, z)))), attention)


class CaiT(Pooling):
    """Class attention: `blocks` of attention and MLP on a learned token while the patches stand still. Attention: the last block's, [B, heads, N].

    The token is among the keys, so that a row's sum over patches is below 1. Weights: a block 12 D^2 + 15 D, token and last norm
    3 D. Residual branches begin at `layer_scale`: with CaiT's 1e-5 the token sees the image only after many steps.
    Raises UserError for heads that do not divide the width or blocks below 1. SimPool paper B.5; CaiT.
    """

    gives_attention = True

    def __init__(self, dim: int, num_heads: int = 4, blocks: int = 1, layer_scale: float = LAYER_SCALE):
        super().__init__(dim)
        if blocks < 1:
            raise UserError(f"pooling.blocks={blocks} is out of range: choose 1 or more")
        self.num_heads, self.blocks, self.layer_scale = self.heads_of(num_heads), blocks, layer_scale
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.cls_token, std=0.02)
        self.layers = nn.ModuleList(ClassAttention(dim, num_heads, layer_scale) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def pool(self, x: Tensor, grid) -> Pooled:
        """What the token has become."""
        u, attention = self.cls_token.to(x.dtype).expand(len(x), -1, -1), None
        for layer in self.layers:
            u, attention = layer(u, x)
        return Pooled(normed(self.norm, u[:, 0]), attention)  # of the last norm the patches would learn nothing (deit, issue 188)


class ClassAttention(nn.Module):
    """One block: token [B, 1, D] and patches [B, N, D] -> the new token, and its attention [B, heads, N]."""

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

    def forward(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Token and patches -> the new token and its attention over patches."""
        tokens = normed(self.norm1, torch.cat([u, x], dim=1))
        z, attention = attend(self, tokens[:, :1], tokens, self.num_heads)
        u = u + self.gamma_1.to(x.dtype) * linear(self.proj, z).unsqueeze(1)
        u = u + self.gamma_2.to(x.dtype) * linear(self.fc2, F.gelu(linear(self.fc1, normed(self.norm2, u))))
        return u, attention[..., 1:]


def attend(layers, u: Tensor, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """One query u [B, 1, D] over tokens [B, T, D] with `wq`, `wk`, `wv` of `layers` -> heads side by side [B, D], attention [B, heads, T].

    No token is mapped: (W_K t)^T q = t^T (W_K^T q), and the weights sum to 1, so that W_V maps the averages.
    """
    width, (wk, wv) = u.shape[-1] // heads, ((layer.weight.to(u.dtype), layer.bias.to(u.dtype)) for layer in (layers.wk, layers.wv))
    query = linear(layers.wq, u[:, 0]).unflatten(-1, (heads, 1, width))
    towards = torch.matmul(query, wk[0].unflatten(0, (heads, width))).squeeze(2)  # [B, heads, D]
    const = torch.matmul(query, wk[1].view(heads, width, 1)).squeeze(-1)  # the bias of the keys moves no softmax, and stays in the graph
    attention = torch.softmax((torch.matmul(towards, tokens.transpose(1, 2)) + const) / math.sqrt(width), dim=-1)
    gathered = torch.matmul(attention, tokens).unsqueeze(2)  # [B, heads, 1, D]
    return (torch.matmul(gathered, wv[0].unflatten(0, (heads, width)).transpose(1, 2)).squeeze(2).flatten(1) + wv[1]), attention

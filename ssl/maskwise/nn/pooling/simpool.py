"""SimPool: one attention-weighted power mean of the patches, asked for by their average."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.tokens import Pooled, Tokens

NORM_EPS = 1e-6
SHIFT = 1e-6  # added after the minimum is taken off, so that no value is zero under the power


class SimPool(nn.Module):
    """Tokens, [B, N, dim] or [B, dim, H, W] -> Pooled(vector [B, dim], attention [B, heads, N], each head's sum 1).

    The query is the mean of the raw tokens, keys and values share one LayerNorm, and values meet in a power mean of
    exponent `gamma` above the minimum (None: a plain mean). `min_scope` takes that minimum per "image", as the paper,
    or per "batch", as the released weights were trained. `beta` adds a learned scalar. Weights: 2 dim^2 + 2 dim (+ 1).
    Raises UserError for arguments outside these. SimPool paper eq. 12-17, pooling.md 1.
    """

    needs: frozenset[str] = frozenset()
    gives_attention = True

    def __init__(self, dim: int, gamma: float | None = 1.25, num_heads: int = 1, min_scope: str = "image", beta: bool = False):
        super().__init__()
        if gamma is not None and gamma <= 0:
            raise UserError(f"pooling.gamma={gamma} is not above 0: choose 1.25 for transformers, 2 for convolutions, or null for a plain mean")
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"pooling.num_heads={num_heads} does not divide the width {dim}: choose a divisor")
        if min_scope not in ("image", "batch"):
            raise UserError(f"pooling.min_scope={min_scope!r} is unknown: choose image or batch")
        self.dim, self.gamma, self.num_heads, self.min_scope = dim, gamma, num_heads, min_scope
        self.norm_patches = nn.LayerNorm(dim, eps=NORM_EPS)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        for layer in (self.wq, self.wk):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        self.beta = nn.Parameter(torch.zeros(1)) if beta and gamma is not None else None

    def forward(self, tokens: Tokens | Tensor) -> Pooled:
        """Tokens, [B, N, D] or [B, D, H, W] -> Pooled; computed in float32 or better, the vector returned in the input's type."""
        patches = tokens.patches if isinstance(tokens, Tokens) else tokens
        if patches.ndim == 4:
            patches = patches.flatten(2).transpose(1, 2)
        with torch.autocast(patches.device.type, enabled=False):  # V^gamma underflows in half precision (pooling.md 1.9)
            vector, attention = self._pool(patches if patches.dtype == torch.float64 else patches.float())
        return Pooled(vector.to(patches.dtype), attention)

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads, width = self.num_heads, self.dim // self.num_heads
        normed = F.layer_norm(x, (self.dim,), self.norm_patches.weight.to(x.dtype), self.norm_patches.bias.to(x.dtype), NORM_EPS)
        query = F.linear(x.mean(dim=1), self.wq.weight.to(x.dtype)).unflatten(-1, (heads, 1, width))
        # (H W_K^T) q = H (W_K^T q): with few queries this order saves N D^2 products an image
        towards = torch.matmul(query, self.wk.weight.to(x.dtype).unflatten(0, (heads, width))).squeeze(2)  # [B, heads, D]
        attention = torch.softmax(torch.matmul(towards, normed.transpose(1, 2)) / math.sqrt(width), dim=-1)
        if self.gamma is None:
            return self._weigh(attention, normed), attention
        low = normed.flatten(1).min(dim=1).values[:, None, None] if self.min_scope == "image" else normed.min()
        values = normed - low + SHIFT
        top = values.detach().amax(dim=1, keepdim=True)  # a scale that cancels: no power of a large gamma under- or overflows
        mean = self._weigh(attention, (values / top).pow(self.gamma)).clamp_min(torch.finfo(x.dtype).tiny)
        mean = mean.pow(1 / self.gamma) * top[:, 0]
        return mean if self.beta is None else mean + self.beta.to(x.dtype), attention

    def _weigh(self, attention: Tensor, values: Tensor) -> Tensor:
        split = values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
        return torch.matmul(attention.unsqueeze(2), split).flatten(1)

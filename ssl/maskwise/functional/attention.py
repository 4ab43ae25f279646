"""Fused attention, the attention weights of a single query, and the patches that hold most of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32, at_least_float32_dtype


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> Tensor:
    """Return attention of q, k, v [B, H, T, d] -> [B, T, H d]: the fused kernel, or matrices with a float32 softmax."""
    if fused:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        logits = (q * scale) @ k.transpose(-2, -1)
        mixed = logits.softmax(dim=-1, dtype=at_least_float32_dtype(logits.dtype)).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the class token's attention over all keys: q_cls [B, H, d], k [B, H, T, d] -> [B, H, T], float32.

    Rows sum to 1. One query against T keys costs less than a thousandth of the block, so fused attention can stay on.
    """
    with torch.autocast(q_cls.device.type, enabled=False):  # bf16 logits would tie patches and reorder them
        q_cls, k = at_least_float32(q_cls), at_least_float32(k)
        return torch.softmax(torch.matmul(k, q_cls.unsqueeze(-1)).squeeze(-1) * scale, dim=-1)


def mean_heads(attention: Tensor) -> Tensor:
    """Return the mean over heads, not renormalized: [V, H, N] -> [V, N] (AttMask, sec. 3.2)."""
    return at_least_float32(attention).mean(dim=1)


def patch_attention(attention: Tensor, queries: int = 1) -> Tensor:
    """Return one map per view, [V, H, N] -> [V, N]: the mean over heads, or the maximum over several queries.

    Maps of a pooling's k query vectors divide the patches among themselves, so that their mean is nearly uniform.
    """
    return at_least_float32(attention).amax(dim=1) if queries > 1 else mean_heads(attention)


def mass_mask(attention: Tensor, share: float) -> Tensor:
    """Choose the fewest patches that hold at least `share` of the attention: [V, N] -> bool [V, N].

    The largest come first, ties by lowest index (DINO's visualization; SimPool, fig. C3). Raises UserError for a share
    outside 0..1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"a share of {share} of the attention is not from 0 to 1")
    values, order = torch.sort(attention.detach().double(), dim=1, descending=True, stable=True)
    before = values.cumsum(dim=1) - values
    chosen = before < share * values.sum(dim=1, keepdim=True) * (1 - 1e-12)
    return torch.zeros_like(chosen).scatter_(1, order, chosen)

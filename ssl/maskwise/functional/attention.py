"""Attention: all of it mixed by one kernel, and that of one query, which is all that masking needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool) -> Tensor:
    """Attention of q, k, v [B, H, T, d] -> [B, T, H d], by the fused kernel or by explicit matrices with a softmax in float32 at least."""
    if fused:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        logits = (q * scale) @ k.transpose(-2, -1)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mixed = logits.softmax(dim=-1, dtype=wide).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def cls_row(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the class token over all keys: q_cls [B, H, d], k [B, H, T, d] -> [B, H, T], float32, rows sum to 1.

    One query against T keys costs less than a thousandth of the block, so fused attention can stay on (attmask.md 2.5).
    """
    with torch.autocast(q_cls.device.type, enabled=False):  # bf16 logits would tie patches and reorder them
        q_cls, k = _full(q_cls), _full(k)
        return torch.softmax(torch.matmul(k, q_cls.unsqueeze(-1)).squeeze(-1) * scale, dim=-1)


def mean_heads(attention: Tensor) -> Tensor:
    """Plain mean over heads, not renormalised: [V, H, N] -> [V, N] (attmask.md 2.4)."""
    return _full(attention).mean(dim=1)


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

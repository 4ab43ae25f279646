"""Attention over packed sequences: batches of different lengths in one row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]  # (B, T) of each batch


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has variable-length attention for this device and dtype."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return kernel() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def kernel():
    """Return torch's variable-length attention function; None in versions without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def attend(q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, scale: float) -> Tensor:
    """Attend inside each sequence of packed q, k, v [tokens, H, d] -> [tokens, H, d]."""
    ends, start = [], 0
    for batch, length in shapes:  # built on the device: no copy to wait for
        ends.append(torch.arange(start, start + batch * length, length, dtype=torch.int32, device=q.device))
        start += batch * length
    bounds = torch.cat([*ends, torch.full((1,), start, dtype=torch.int32, device=q.device)])
    longest = max(length for _, length in shapes)
    return kernel()(q, k, v, bounds, bounds, longest, longest, scale=scale)

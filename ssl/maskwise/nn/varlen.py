"""Attention over packed sequences: batches of different lengths as one row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]  # (B, T) of each batch


def takes_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has attention over packed sequences for tensors of this device and type."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return kernel() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def kernel():
    """torch's function, None where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def attend(q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, scale: float) -> Tensor:
    """Attention inside each sequence of packed q, k, v [tokens, H, d] -> [tokens, H, d]."""
    ends, done = [], 0
    for batch, length in shapes:  # made on the device, so that nothing waits for a copy
        ends.append(torch.arange(done, done + batch * length, length, dtype=torch.int32, device=q.device))
        done += batch * length
    bounds = torch.cat([*ends, torch.full((1,), done, dtype=torch.int32, device=q.device)])
    longest = max(length for _, length in shapes)
    return kernel()(q, k, v, bounds, bounds, longest, longest, scale=scale)

"""Attention over packed sequences: batches of different lengths in one row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]  # (B, T) of each batch
Rows = tuple[int, ...]  # of each batch, how many leading tokens of a sequence are used


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


def attend(q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, scale: float, rows: Rows | None = None) -> Tensor:
    """Attend inside each sequence of packed k, v [tokens, H, d] -> [queries, H, d].

    q [queries, H, d] holds every token, or the first `rows` of each sequence.
    """
    bounds, longest = sequence_bounds(shapes, q.device)
    if rows is None:
        return kernel()(q, k, v, bounds, bounds, longest, longest, scale=scale)
    query_bounds, longest_query = sequence_bounds(shapes_of_rows(shapes, rows), q.device)
    return kernel()(q, k, v, query_bounds, bounds, longest_query, longest, scale=scale)


def sequence_bounds(shapes: Shapes, device: torch.device) -> tuple[Tensor, int]:
    """Return where each packed sequence begins and the last one ends, int32 [sequences + 1], and the longest length."""
    starts, start = [], 0
    for batch, length in shapes:  # built on the device: no copy to wait for
        starts.append(torch.arange(start, start + batch * length, length, dtype=torch.int32, device=device))
        start += batch * length
    bounds = torch.cat([*starts, torch.full((1,), start, dtype=torch.int32, device=device)])
    return bounds, max(length for _, length in shapes)


def shapes_of_rows(shapes: Shapes, rows: Rows) -> Shapes:
    """Return the shapes of batches of which only the first `rows` tokens of each sequence remain."""
    return tuple((batch, count) for (batch, _), count in zip(shapes, rows))


def first_rows(x: Tensor, rows: Rows | None, shapes: Shapes | None) -> Tensor:
    """Return the first `rows` tokens of each sequence: [B, T, D] -> [B, R, D], packed [tokens, D] -> [queries, D].

    None keeps all; `shapes` are those of packed batches, with one number of rows each.
    """
    if rows is None:
        return x
    if shapes is None:
        return x[:, : rows[0]]
    parts = x.split([batch * length for batch, length in shapes])
    return torch.cat(
        [
            part if count == shape[1] else part.unflatten(0, shape)[:, :count].flatten(0, 1)
            for part, shape, count in zip(parts, shapes, rows)
        ]
    )

"""Masks of patches: random, block-wise, and guided by attention.

Every function returns bool [V, N], True = masked, one row per view, patches row-major. A row depends on its own ratio,
attention and noise only. Counts are int(ratio * N) in double precision, computed on the host without a sync. `noise`
(uniforms) takes the place of a generator where draws are keyed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.block_mask import BLOCK_TRIES, block_mask
from maskwise.functional.mask_ratios import ratio_list


def random_mask(
    ratios, grid: tuple[int, int], generator: torch.Generator | None = None, noise: Tensor | None = None
) -> Tensor:
    """Mask exactly int(r * N) random patches of each view: ratios [V], grid (h, w) -> bool [V, h*w].

    noise [V, N] uniforms: the lowest are masked, ties by lowest index. Raises UserError for a ratio outside 0..1 or
    noise of another shape.
    """
    patches = grid[0] * grid[1]
    ratios = ratio_list(ratios, None if noise is None else len(noise))
    noise = _noise((len(ratios), patches), generator, noise)
    return _first(torch.argsort(noise, dim=1, stable=True), [int(r * patches) for r in ratios])


def blockwise_mask(
    ratios, grid: tuple[int, int], generator: torch.Generator | None = None, noise: Tensor | None = None
) -> Tensor:
    """Mask rectangles up to a view's target r * N, never more: ratios [V], grid (h, w) -> bool [V, h*w].

    As in iBOT, after BEiT (sec. 2.3). Each try takes four uniforms of noise [V, tries, 4]: area between
    (min(h, w) // 3)^2 and the rest of the target, log-aspect within ln 0.3 .. ln 1/0.3, top, left. A rectangle is
    accepted if it is smaller than the grid on both axes and masks something new without exceeding the target. A view
    ends after ten failed tries in a row. Raises UserError for a ratio outside 0..1 or noise of another shape.
    """
    ratios = ratio_list(ratios, None if noise is None else len(noise))
    noise = _noise((len(ratios), BLOCK_TRIES if noise is None else noise.shape[1], 4), generator, noise)
    rows = [
        block_mask(r * grid[0] * grid[1], grid, tries)
        for r, tries in zip(ratios, noise.to("cpu", torch.float64).numpy())
    ]
    mask = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, grid[0] * grid[1], dtype=torch.bool)
    return _upload(mask, noise.device)


def attention_mask(
    attention: Tensor,
    ratio: float | Sequence[float],
    mode: str = "high",
    show_ratio: float | Sequence[float] = 0.0,
    show_max: float = 0.1,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Mask the int(ratio * N) most ("high") or least ("low") attended patches: [V, N] -> bool [V, N].

    "hint" masks as "high", then reveals int(N * show_ratio) random patches among the int(N * show_max) most attended.
    ratio and show_ratio are one number or one per view, 0 masks or reveals none. noise [V, N]: the lowest of the most
    attended are revealed. Ties by lowest index (AttMask, sec. 3.2). Raises UserError for an unknown mode, a ratio
    outside 0..1 or a wrong shape.
    """
    if mode not in ("high", "low", "hint"):
        raise UserError(f"unknown attention masking {mode!r}; choose high, low or hint")
    if attention.ndim != 2:
        raise UserError(f"attention must be [views, patches], got {list(attention.shape)}; average the heads first")
    views, patches = attention.shape
    order = torch.argsort(attention.detach(), dim=1, descending=mode != "low", stable=True)
    mask = _first(order, [int(patches * r) for r in ratio_list(ratio, views)])
    if mode != "hint":
        return mask
    pool = int(patches * show_max)
    reveal = [min(int(patches * r), pool) for r in ratio_list(show_ratio, views)]
    if not any(reveal):
        return mask
    noise = _noise((views, patches), generator, noise, attention.device).to(attention.device)
    outside = ~_first(order, [pool] * views)
    return mask & ~_first(torch.argsort(noise.masked_fill(outside, torch.inf), dim=1, stable=True), reveal)


def _first(order: Tensor, counts: list[int]) -> Tensor:
    """Return bool [V, N], True at the first counts[v] entries of each row of order [V, N]."""
    count = _upload(torch.tensor(counts, dtype=torch.int64), order.device)
    chosen = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, noise: Tensor | None, device=None) -> Tensor:
    """Return the given uniforms, or new ones on the generator's device."""
    if noise is None:
        device = generator.device if generator is not None else device or "cpu"
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    if tuple(noise.shape) != shape:
        raise UserError(f"noise has shape {list(noise.shape)}, these views need {list(shape)}")
    return noise


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without a host sync."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

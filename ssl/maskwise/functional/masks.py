"""Which patches to hide: random, block-wise, and guided by attention.

Every function returns bool [V, N], True = hidden, one row per view, patches row-major. A row depends on its own
ratio, attention and noise only. Counts are int(ratio * N) in double precision, taken on the host, so that the number
of hidden patches is known without asking the device. Pass `noise` (uniforms) instead of a generator to key the draws.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskwise.functional.errors import UserError

BLOCK_TRIES = 256  # twice what any view took on grids up to 64x64 at ratios up to 1, of 7,500 measured
_ATTEMPTS = 10  # attempts at one block before the view is left as it is
_LOG_ASPECT = math.log(1 / 0.3)


def draw_ratio(u: float, ratio: float | Sequence[float], var: float | Sequence[float] = 0.0) -> float:
    """Turn one uniform into a ratio: U(ratio - var, ratio + var), of an entry picked evenly if lists are given.

    attmask.md 2.1. One uniform does both: its leading part picks the entry, the rest is uniform again.
    """
    ratios = [ratio] if isinstance(ratio, (int, float)) else list(ratio)
    spreads = [var] * len(ratios) if isinstance(var, (int, float)) else list(var)
    if not ratios or len(spreads) != len(ratios):
        raise UserError(f"mask ratio has {len(ratios)} entries but var has {len(spreads)}; give one var per ratio")
    for middle, spread in zip(ratios, spreads):
        if not 0 <= middle - spread <= middle + spread <= 1:
            raise UserError(f"mask ratio {middle} with var {spread} leaves 0..1; ratio - var and ratio + var must lie in it")
    entry = min(int(u * len(ratios)), len(ratios) - 1)
    rest = u * len(ratios) - entry
    return ratios[entry] + spreads[entry] * (2 * rest - 1)


def random_mask(ratios, grid: tuple[int, int], generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
    """Hide exactly int(r * N) patches of each view, chosen evenly: ratios [V], grid (h, w) -> bool [V, h*w].

    noise [V, N] uniforms: the lowest are hidden, ties by lowest index. Raises UserError for a ratio outside 0..1
    or noise of another shape. attmask.md 2.3.
    """
    patches = grid[0] * grid[1]
    ratios = _ratio_list(ratios, None if noise is None else len(noise))
    noise = _noise((len(ratios), patches), generator, noise)
    return _first(torch.argsort(noise, dim=1, stable=True), [int(r * patches) for r in ratios])


def blockwise_mask(ratios, grid: tuple[int, int], generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
    """Hide rectangles until a view's target r * N is reached, never passing it: ratios [V], grid (h, w) -> bool [V, h*w].

    BEiT-like (attmask.md 2.2). Each try takes four uniforms of noise [V, tries, 4]: area between (min(h, w) // 3)^2 and
    what is left, log-aspect within ln .3 .. ln 1/.3, top, left. It is accepted if the rectangle is smaller than the
    grid on both axes and hides something new without passing the target. A view ends for good after ten failed tries in a
    row, or when its tries run out; `BLOCK_TRIES` are plenty. Raises UserError for a ratio outside 0..1 or a
    wrong shape of noise.
    """
    ratios = _ratio_list(ratios, None if noise is None else len(noise))
    noise = _noise((len(ratios), BLOCK_TRIES if noise is None else noise.shape[1], 4), generator, noise)
    rows = [_blocks(r * grid[0] * grid[1], grid, tries) for r, tries in zip(ratios, noise.to("cpu", torch.float64).numpy())]
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
    """AttMask: hide the int(ratio * N) most ("high") or least ("low") attended patches: [V, N] -> bool [V, N].

    "hint" hides as "high" and then reveals int(N * show_ratio) patches, chosen evenly among the int(N * show_max) most
    attended and never outside them; with a drawn ratio r', show_ratio is show_max * r'. ratio and show_ratio are one
    number or one per view, 0 leaves a view as it is. noise [V, N]: of the pool the lowest are revealed. Ties by lowest
    index. Raises UserError for an unknown mode, a ratio outside 0..1 or a wrong shape. Kakogeorgiou et al. 2022, attmask.md 2.4.
    """
    if mode not in ("high", "low", "hint"):
        raise UserError(f"unknown attention masking {mode!r}; choose high, low or hint")
    if attention.ndim != 2:
        raise UserError(f"attention must be [views, patches], got {list(attention.shape)}; average the heads first")
    views, patches = attention.shape
    order = torch.argsort(attention.detach(), dim=1, descending=mode != "low", stable=True)
    mask = _first(order, [int(patches * r) for r in _ratio_list(ratio, views)])
    if mode != "hint":
        return mask
    pool = int(patches * show_max)
    reveal = [min(int(patches * r), pool) for r in _ratio_list(show_ratio, views)]
    if not any(reveal):
        return mask
    noise = _noise((views, patches), generator, noise, attention.device).to(attention.device)
    outside = ~_first(order, [pool] * views)
    return mask & ~_first(torch.argsort(noise.masked_fill(outside, torch.inf), dim=1, stable=True), reveal)


def _first(order: Tensor, counts: list[int]) -> Tensor:
    """True at the first counts[v] entries of each row of order [V, N]."""
    chosen = torch.arange(order.shape[1], device=order.device) < _upload(torch.tensor(counts, dtype=torch.int64), order.device)[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _blocks(target: float, grid: tuple[int, int], tries: np.ndarray) -> np.ndarray:
    """One view of block-wise masking; the mask is held in the bits of one integer, which makes a try about a microsecond."""
    height, width = grid
    low = (min(grid) // 3) ** 2
    column = _columns(height, width)
    hidden = count = failures = 0
    # Most views need few of their tries: turn them into Python numbers as they are asked for.
    for area, aspect, top, left in itertools.chain.from_iterable(tries[i : i + 32].tolist() for i in range(0, len(tries), 32)):
        remaining = target - count
        if remaining <= 0 or failures == _ATTEMPTS:
            break
        failures += 1
        aspect = math.exp((2 * aspect - 1) * _LOG_ASPECT)
        area = low + area * (remaining - low)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        row, start = int(top * (height - h + 1)), int(left * (width - w + 1))
        block = (column[h] * ((1 << w) - 1)) << (row * width + start)
        new = h * w - (hidden & block).bit_count()
        if 0 < new <= remaining:
            hidden, count, failures = hidden | block, count + new, 0
    packed = np.frombuffer(hidden.to_bytes((height * width + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=height * width, bitorder="little").astype(bool)


@functools.cache
def _columns(height: int, width: int) -> list[int]:
    """For h = 0..height: the bits of h patches one below the other."""
    return [0, *itertools.accumulate(1 << width * i for i in range(height))]


def _ratio_list(ratios, views: int | None) -> list[float]:
    """Ratios as Python floats, one per view."""
    if isinstance(ratios, (Tensor, np.ndarray)):
        array = ratios.detach().cpu().numpy() if isinstance(ratios, Tensor) else ratios
        # 0.7 in float32 is a little less than 0.7 and would lose a patch: read the decimal it stands for.
        array = array.astype("U").astype(np.float64) if array.dtype in (np.float32, np.float16) else array
        ratios = array.tolist()
    if isinstance(ratios, (int, float)):
        ratios = [ratios] * (1 if views is None else views)
    ratios = [float(r) for r in ratios]
    if views is not None and len(ratios) != views:
        raise UserError(f"{len(ratios)} mask ratios for {views} views; give one number, or one per view")
    for r in ratios:
        if not 0 <= r <= 1:
            raise UserError(f"mask ratio {r} lies outside 0..1")
    return ratios


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, noise: Tensor | None, device=None) -> Tensor:
    """The uniforms to use: those given, or fresh ones on the generator's device."""
    if noise is None:
        device = generator.device if generator is not None else device or "cpu"
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
    if tuple(noise.shape) != shape:
        raise UserError(f"noise has shape {list(noise.shape)}, these views need {list(shape)}")
    return noise


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

"""Block-wise mask of one view (BEiT, sec. 2.3; iBOT)."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

BLOCK_TRIES = 256  # twice the most of 7,500 views, on grids up to 64x64 at ratios up to 1
_ATTEMPTS = 10  # failed tries in a row that end a view
_LOG_ASPECT = math.log(1 / 0.3)


def block_mask(target: float, grid: tuple[int, int], tries: np.ndarray) -> np.ndarray:
    """Return the block-wise mask of one view, bool [h*w]; its bits are in one integer, where a try takes about 1 us."""
    height, width = grid
    low = (min(grid) // 3) ** 2
    column = _columns(height, width)
    bits = count = failures = 0
    # most views need few of their tries: convert them to Python numbers in small parts
    for area, aspect, top, left in itertools.chain.from_iterable(
        tries[i : i + 32].tolist() for i in range(0, len(tries), 32)
    ):
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
        new = h * w - (bits & block).bit_count()
        if 0 < new <= remaining:
            bits, count, failures = bits | block, count + new, 0
    packed = np.frombuffer(bits.to_bytes((height * width + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=height * width, bitorder="little").astype(bool)


@functools.cache
def _columns(height: int, width: int) -> list[int]:
    """Return the bits of a column of h patches, for h = 0..height."""
    return [0, *itertools.accumulate(1 << width * i for i in range(height))]

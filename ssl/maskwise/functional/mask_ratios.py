"""Mask ratios: drawn from intervals; one per view, in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from maskwise.errors import UserError


def draw_ratio(u: float, ratio: float | Sequence[float], var: float | Sequence[float] = 0.0) -> float:
    """Turn one uniform into a ratio: U(ratio - var, ratio + var), of a random entry if lists are given.

    The leading part of the uniform picks the entry, the rest is uniform again. Raises UserError for a ratio outside
    0..1, and for lists of different lengths.
    """
    ratios = [ratio] if isinstance(ratio, (int, float)) else list(ratio)
    spreads = [var] * len(ratios) if isinstance(var, (int, float)) else list(var)
    if not ratios or len(spreads) != len(ratios):
        raise UserError(f"mask ratio has {len(ratios)} entries but var has {len(spreads)}; give one var per ratio")
    for middle, spread in zip(ratios, spreads):
        if not 0 <= middle - spread <= middle + spread <= 1:
            raise UserError(
                f"mask ratio {middle} with var {spread} goes outside 0..1: choose ratio - var and ratio + var within it"
            )
    entry = min(int(u * len(ratios)), len(ratios) - 1)
    rest = u * len(ratios) - entry
    return ratios[entry] + spreads[entry] * (2 * rest - 1)


def ratio_list(ratios, views: int | None) -> list[float]:
    """Return ratios as Python floats, one per view."""
    if isinstance(ratios, (Tensor, np.ndarray)):
        array = ratios.detach().cpu().numpy() if isinstance(ratios, Tensor) else ratios
        # 0.7 in float32 is less than 0.7 and would lose a patch: read its shortest decimal
        array = array.astype("U").astype(np.float64) if array.dtype in (np.float32, np.float16) else array
        ratios = array.tolist()
    if isinstance(ratios, (int, float)):
        ratios = [ratios] * (1 if views is None else views)
    ratios = [float(r) for r in ratios]
    if views is not None and len(ratios) != views:
        raise UserError(f"{len(ratios)} mask ratios for {views} views: give one number, or one per view")
    for r in ratios:
        if not 0 <= r <= 1:
            raise UserError(f"mask ratio {r} lies outside 0..1")
    return ratios

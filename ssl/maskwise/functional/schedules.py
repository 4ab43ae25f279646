"""Schedules as functions of the step or the epoch."""

from __future__ import annotations

import math

from maskwise.functional.errors import UserError


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0, warmup_start: float = 0.0) -> float:
    """Linear from warmup_start to start over `warmup` steps, both ends included, then half a cosine towards end.

    So the first warm-up step is warmup_start, start is held for two steps, and end is approached but not reached before
    step `total`. Raises UserError if the warm-up is longer than the run. attmask.md 1.6.
    """
    if warmup > total:
        raise UserError(f"a warm-up of {warmup} steps is longer than the run of {total}; shorten it or train longer")
    if step < warmup:
        return warmup_start + (start - warmup_start) * step / max(1, warmup - 1)
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def temperature(epoch: int, warm: float, final: float, warm_epochs: int, hold: int = 0) -> float:
    """Teacher temperature of an epoch: `hold` epochs at warm, a linear ramp over warm_epochs with both ends, then final.

    Constant within an epoch. attmask.md 1.6.
    """
    epoch = int(epoch)
    if epoch < hold:
        return warm
    if epoch - hold >= warm_epochs:
        return final
    return warm + (final - warm) * (epoch - hold) / max(1, warm_epochs - 1)

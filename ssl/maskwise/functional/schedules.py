"""Schedules as functions of the step or the epoch."""

from __future__ import annotations

import math

from maskwise.errors import UserError


def ramp(step: int, low: float, high: float, warmup: int) -> float:
    """Return the value of a linear warm-up at a step: from low to high in `warmup` steps, both included."""
    return low + (high - low) * step / max(1, warmup - 1)


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0, warmup_start: float = 0.0) -> float:
    """Return the value at a step: linear warm-up from warmup_start to start, both included, then half a cosine to end.

    The first step is warmup_start, two steps in a row are at start, and end is reached at step `total`, not before, as
    in DINO. Raises UserError if the warm-up is longer than the run.
    """
    if warmup > total:
        raise UserError(f"a warm-up of {warmup} steps is longer than the run of {total}; shorten it or train longer")
    if step < warmup:
        return ramp(step, warmup_start, start, warmup)
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def trapezoid(
    step: int, total: int, start: float, end: float, decay: int = 0, warmup: int = 0, warmup_start: float = 0.0
) -> float:
    """Return the value at a step: warm-up as in `cosine`, then start, and a decay to end in the last steps.

    decay: number of last steps, 0 for none; start holds up to step total - decay, included, and after k steps of the
    decay the value is end + (start - end) (1 - sqrt(k / decay)) (warmup-stable-decay, Hu et al. 2024; the shape of
    Hägele et al. 2024). Raises UserError if warm-up and decay are longer than the run.
    """
    if warmup + decay > total:
        raise UserError(
            f"a warm-up of {warmup} steps and a decay of {decay} are longer than the run of {total}: shorten one of "
            "them, or train longer"
        )
    if step < warmup:
        return ramp(step, warmup_start, start, warmup)
    if step <= total - decay or not decay:
        return start
    return end + (start - end) * (1 - math.sqrt(min(1.0, (step - total + decay) / decay)))


def late_cosine(step: int, total: int, start: float, end: float, decay: int = 0) -> float:
    """Return the value at a step: start, and in the last `decay` steps half a cosine to end, reached at `total`."""
    first = total - decay
    return start if step <= first or not decay else cosine(step - first, decay, start, end)


def temperature(epoch: int, warm: float, final: float, warm_epochs: int, hold: int = 0) -> float:
    """Return the teacher temperature of an epoch: `hold` epochs at warm, a linear ramp over warm_epochs, then final.

    The ramp includes both ends; the temperature is constant within an epoch, as in DINO and iBOT.
    """
    epoch = int(epoch)
    if epoch < hold:
        return warm
    if epoch - hold >= warm_epochs:
        return final
    return warm + (final - warm) * (epoch - hold) / max(1, warm_epochs - 1)

"""Schedules counted in epochs: shortened with the run, refused where they were written for the run as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskwise.recipe.schema import Key
from maskwise.recipe.yaml_text import Entry, ParseError, convert

Length = tuple[int, int | None]  # train.epochs and train.steps of a recipe
LENGTH = ("train.epochs", "train.steps")
TOO_LONG = "warm-up ({value:g} epochs) is longer than the run ({length}); shorten it or lengthen the run"
# not shortened in a run of steps, which earlier versions trained with a frozen last layer
FROZEN = (
    "the last layer is frozen for the whole run: optimizer.freeze_last_layer is {value:g} epochs and {length}; give 0 "
    "to train it"
)


@dataclass(frozen=True)
class Schedule:
    """A key counted in epochs.

    conflict: the text for a run too short for it; None: such a run is possible. whole: a whole number, of at least
    `least`. must_end: it leaves at least a part of the run.
    """

    key: str
    conflict: str | None
    whole: bool = False
    least: int = 0
    must_end: bool = False

    def fits(self, value: float, epochs: float) -> bool:
        """Whether a run of that many epochs is long enough."""
        return value < epochs if self.must_end else value <= math.ceil(epochs)

    def scaled(self, value: float, ratio: float) -> float:
        """Return the value in proportion to a shorter run."""
        if self.whole:
            return max(self.least, math.floor(value * ratio) if self.must_end else round(value * ratio))
        return float(f"{value * ratio:.4g}")


SCHEDULES = (
    Schedule("optimizer.warmup_epochs", f"the learning-rate {TOO_LONG}"),
    Schedule("teacher.warmup_temp_epochs", f"the temperature {TOO_LONG}", whole=True, least=1),
    Schedule(
        "method.head_warmup_epochs",
        "the head warm-up ({value:g} epochs) leaves nothing of the run ({length}); shorten it or lengthen the run",
        must_end=True,
    ),
    Schedule(
        "method.start_epoch",
        "masking would start at epoch {value:g}, after the end of the run ({length}); start it earlier",
        whole=True,
        must_end=True,
    ),
    Schedule("optimizer.freeze_last_layer", None, whole=True, must_end=True),
)


@dataclass(frozen=True)
class Fit:
    """Schedules fitted to the length of a run: changed values, a line that states them, conflicts as (keys, text)."""

    values: dict[str, float]
    notes: list[str]
    conflicts: list[tuple[str, str]]


def intended_lengths(layers: list[dict[str, Entry]], keys: Mapping[str, Key]) -> dict[str, tuple[Length, ...]]:
    """Return the lengths of the run that each schedule was written for, the latest first.

    None where the schedule was written together with the present length, or after it.
    """
    lengths = [(keys["train.epochs"].default, keys["train.steps"].default)]
    for layer in layers:
        lengths.append(tuple(written(layer, key, keys, before) for key, before in zip(LENGTH, lengths[-1])))
    last = max((place for place, layer in enumerate(layers, 1) if any(key in layer for key in LENGTH)), default=0)
    intended = {}
    for schedule in SCHEDULES:
        first = max((place for place, layer in enumerate(layers, 1) if schedule.key in layer), default=0)
        intended[schedule.key] = tuple(dict.fromkeys(reversed(lengths[first:last])))
    return intended


def written(layer: dict[str, Entry], key: str, keys: Mapping[str, Key], before):
    """Return the value of a key after a layer, `before` where the layer does not state a valid one."""
    if key not in layer:
        return before
    try:
        return convert(layer[key].value, keys[key].type)
    except ParseError:
        return before


def fit(
    values: Mapping[str, Any], intended: Mapping[str, tuple[Length, ...]], steps_per_epoch: int, length: str
) -> Fit:
    """Shorten the schedules that leave nothing of the run, in proportion to the length they were written for.

    A schedule written for this length may fill it. steps_per_epoch: 0 where the number of images is not known, which a
    run of train.steps needs; length: the run's, in words, for the conflicts.
    """
    epochs = in_epochs((values["train.epochs"], values["train.steps"]), steps_per_epoch)
    found, lines, refused, frozen = {}, {}, [], []
    for schedule in SCHEDULES:
        value = values.get(schedule.key)
        if not value or value < epochs:
            continue
        if schedule.conflict is None and values["train.steps"] is not None:
            frozen.append(FROZEN.format(value=value, length=length))
            continue
        candidates = (in_epochs(length, steps_per_epoch) for length in intended[schedule.key])
        before = next((before for before in candidates if before and schedule.fits(value, before)), None)
        if before is not None:
            shortened = schedule.scaled(value, epochs / before)
            if shortened != value:  # 1 epoch of temperatures stays in a run of 1 epoch
                found[schedule.key] = shortened
                lines.setdefault(before, []).append(f"{schedule.key} {value:g} to {shortened:g}")
        elif schedule.conflict and not schedule.fits(value, epochs):
            text = schedule.conflict.format(value=value, length=length)
            refused.append((f"{schedule.key} train.epochs train.steps", text))
    notes = [
        f"schedules of {before:.3g} epochs shortened to {epochs:.3g}: {', '.join(changes)}"
        for before, changes in lines.items()
    ]
    return Fit(found, notes + frozen, refused)


def in_epochs(length: Length, steps_per_epoch: int) -> float | None:
    """Return a length in epochs, None where it is in steps and the number of images is not known."""
    epochs, steps = length
    if steps is None:
        return epochs
    return steps / steps_per_epoch if steps_per_epoch else None

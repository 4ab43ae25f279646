"""Exponent gamma of SimPool, which no tensor holds: from settings, the run's arguments, or a released model's name."""

from __future__ import annotations

import math
import re
from numbers import Real
from pathlib import Path

from maskwise.errors import UserError

RELEASED = {"vits": 1.25, "resnet50": 2.0, "convnext_small": 2.0}  # of the tables in SimPool's repository
NAME = re.compile(  # of a file, its folder, or its repository in the Hub's cache
    rf"(?:models--.+--)?({'|'.join(RELEASED)})_(?:dino|supervised)_simpool(_no_gamma)?_ep\d+(?:\.pth(?:\.tar)?)?"
)
DEPTH_OF_CACHE = 4  # models--OWNER--NAME/snapshots/COMMIT/FILE


def gamma_of(args: dict, settings: dict, path: Path) -> float | None:
    """Return the gamma given, else that of the run's arguments, else that of a released model of this name.

    `settings` has `gamma` where it is given, and `unstored_gamma` as a default. None stands for no power. Raises
    UserError where nothing tells it, and for an argument that is no gamma.
    """
    if "gamma" in settings:
        return settings["gamma"]
    if "gamma" in args:
        return stored(args["gamma"], path)
    match = name_of(path)
    if match is not None:
        return None if match[2] else RELEASED[match[1]]
    if "unstored_gamma" in settings:
        return settings["unstored_gamma"]
    raise UserError(
        f"{path} does not say which gamma its SimPool had: give gamma=1.25 (its transformers), "
        "gamma=2.0 (its convolutional networks), or gamma=None if its name says no_gamma"
    )


def stored(value, path: Path) -> float | None:
    """Return the gamma in a run's arguments; raises UserError for other than a positive number or None."""
    if value is None or value == "None":  # as on the command line of SimPool's code
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise UserError(f"{path}: gamma={str(value)[:40]!r} in its arguments is no positive number: give gamma=...")
    return float(value)


def name_of(path: Path) -> re.Match | None:
    """Return the match of a released model's name nearest to the end of a path."""
    return next(filter(None, map(NAME.fullmatch, reversed(path.parts[-DEPTH_OF_CACHE:]))), None)

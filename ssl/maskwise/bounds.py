"""Bounds of numbers as annotations: `Annotated[int, AtLeast(1)]`, and the usual ones by name.

A constructor states the type and the bounds of its arguments; recipes read both from its signature.
"""

from dataclasses import dataclass
from typing import Annotated, Union


@dataclass(frozen=True)
class AtLeast:
    """Numbers from `low`, and below `below` where that is given."""

    low: float
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether a number lies within."""
        return value >= self.low and (self.below is None or value < self.below)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.below is None else f"from {self.low} to below {self.below}"


@dataclass(frozen=True)
class Above:
    """Numbers above `low`, and up to `at_most` where that is given."""

    low: float
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether a number lies within."""
        return value > self.low and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f"above {self.low}" if self.at_most is None else f"above {self.low} and at most {self.at_most}"


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether a number lies within."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


BOUNDS = (AtLeast, Above, Between)

Count = Annotated[int, AtLeast(1)]
Size = Union[Count, tuple[Count, Count]]  # of an image in pixels: its side, or (height, width)
NonNegativeInt = Annotated[int, AtLeast(0)]
NonNegative = Annotated[float, AtLeast(0)]
Positive = Annotated[float, Above(0)]
Probability = Annotated[float, Between(0, 1)]
Rate = Annotated[float, AtLeast(0, below=1)]  # of dropout, momentum, smoothing
Fraction = Annotated[float, Above(0, at_most=1)]  # of an area or a side

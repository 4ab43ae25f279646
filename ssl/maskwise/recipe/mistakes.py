"""Mistakes in a recipe: one line each, and the keys whose values they leave in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskwise.errors import UserError


@dataclass(frozen=True)
class Mistake:
    """A line on one mistake.

    doubtful: keys whose intended value is not known because of it; a conflict with them is no second mistake.
    """

    line: str
    doubtful: tuple[str, ...] = ()


def error_of(mistakes: Sequence[Mistake], source: str) -> UserError:
    """Return one mistake as one line, several under a line that counts them."""
    lines = [mistake.line for mistake in mistakes]
    if len(lines) == 1:
        return UserError(*lines)
    return UserError(f"{source}: {len(lines)} mistakes", *(f"  {line}" for line in lines))


def doubts(mistakes: Sequence[Mistake]) -> set[str]:
    """Return the keys that any of the mistakes leaves in doubt."""
    return {key for mistake in mistakes for key in mistake.doubtful}

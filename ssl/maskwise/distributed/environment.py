"""The variables that a launcher sets on every rank, checked; nothing heavy is imported."""

import os
from dataclasses import dataclass

from maskwise.errors import UserError

REMEDY = "start with torchrun, which sets it, or unset WORLD_SIZE for a single process"


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and its rank on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def read_ranks() -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; without WORLD_SIZE, or with 1, the others do not count.

    Raises UserError for values that are no numbers or do not fit each other.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        return Ranks()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {size} but {missing[0]} is not set: {REMEDY}")
    rank = _number("RANK", 0, most=size - 1)
    _number("MASTER_PORT", 0, least=1, most=65535)
    return Ranks(rank, size, _number("LOCAL_RANK", rank))


def world_size() -> int:
    """Return the number of ranks; raises UserError as `read_ranks` does."""
    return read_ranks().size


def local_world_size(default: int) -> int:
    """Return the number of ranks on this machine, by LOCAL_WORLD_SIZE if it is set; raises UserError for no number."""
    return _number("LOCAL_WORLD_SIZE", default, least=1)


def _number(name: str, default: int, least: int = 0, most: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if text.isascii() and text.isdigit() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    numbers = f"from {least} to {most}" if most is not None else f"of at least {least}"
    raise UserError(f"{name}={text} is not a whole number {numbers}: {REMEDY}")

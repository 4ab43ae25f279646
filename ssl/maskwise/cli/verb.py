"""A command of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maskwise.cli.console import Parser


@dataclass(frozen=True)
class Verb:
    """One command: its line in `maskwise --help`, its options, and the function that runs it.

    run: the words after the verb -> exit status. Everything heavy is imported inside `run`, so that `--help` is fast.
    """

    summary: str
    parser: Callable[[], Parser]
    run: Callable[[list[str]], int]

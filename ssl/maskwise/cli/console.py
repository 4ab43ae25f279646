"""Console output: results from rank 0, errors in one line, an argument parser that raises UserError."""

from __future__ import annotations

import argparse
import contextlib
import os

from maskwise.engine.signals import StopSignals
from maskwise.errors import UserError
from maskwise.process import streams


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        for optional in (", section.key=value", ", key=value"):  # argparse also lists arguments that may be absent
            message = message.replace(optional, "")
        raise UserError(f"{message}; see `{self.prog} --help`")


def check_folder_of(option: str, file: str | None) -> None:
    """Raise UserError where the folder of a file to be written does not exist."""
    if file and not os.path.isdir(os.path.dirname(file) or "."):
        raise UserError(f"{option} {file}: its folder does not exist; make it first")


def print_line(text: str, end: str = "\n") -> None:
    """Print to standard output, from rank 0 only."""
    if streams.is_first_rank():
        streams.print_output(text, end)


def print_error(text: str) -> None:
    """Print one line to standard error, once per job: from the rank that fails first."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        streams.print_error(f"maskwise: {text}")
        return
    from maskwise.distributed.world import report_once

    with contextlib.suppress(KeyboardInterrupt), StopSignals() as signals:  # the user may press Ctrl-C twice
        reported = report_once(text, ending=lambda: signals.asked)
        if reported is not None:
            streams.print_error(f"maskwise: {reported}")

"""Progress on standard error: a line that is refreshed on a terminal, elsewhere a plain line now and then.

`Progress` shows itself. What evaluations count (`counting`, `counted`) is shown only inside `showing`, which commands
and runs enter, so that a program that calls the package sees nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

from maskwise.process import streams

BAR_SECONDS = 0.2
FIRST_SECONDS, PLAIN_SECONDS = 10.0, 30.0  # of plain lines: short computations print none


class Progress:
    """Count done items of a total and show rate and remaining time, on the first rank only.

    what: the beginning of the line; unit: of the rate, such as img; shown: False to count alone.
    """

    def __init__(self, what: str, total: int, unit: str = "img", done: int = 0, shown: bool = True):
        self.what, self.total, self.unit = what, total, unit
        self.done: float = done
        self.before = done
        self.shown = shown and streams.is_first_rank()
        self.terminal = self.shown and streams.is_terminal(sys.stderr)
        self.begin = time.monotonic()
        self.due = self.begin + (BAR_SECONDS if self.terminal else FIRST_SECONDS)
        self.bar = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            streams.print_error("\r" + " " * len(self.bar) + "\r", end="")
            self.bar = ""

    def add(self, count: float) -> None:
        """Count items; shows the line if it is due."""
        self.done += count
        if self.shown and time.monotonic() >= self.due:
            self._show()

    def text(self) -> str:
        """Return the line: done, rate and remaining time."""
        rate = (self.done - self.before) / max(time.monotonic() - self.begin, 1e-9)
        left = (self.total - self.done) / rate if rate else 0
        rate_text = f"{rate:.{0 if rate >= 10 else 2}f} {self.unit}/s"
        return f"{self.what} {self.done:.0f}/{self.total}  {rate_text}  eta {clock(left)}"

    def _show(self) -> None:
        self.due = time.monotonic() + (BAR_SECONDS if self.terminal else PLAIN_SECONDS)
        if not self.terminal:
            streams.print_error(self.text())
            return
        width = streams.columns(sys.stderr) - 1  # a longer line would wrap and could not be erased
        self.bar = self.text()[:width].ljust(width)  # covers what the line held before, such as the bar of a run
        streams.print_error(f"\r{self.bar}", end="")


_title: ContextVar[str | None] = ContextVar("title of what is counted", default=None)
_whole: ContextVar[Progress | None] = ContextVar("count that readings of images are part of", default=None)


@contextlib.contextmanager
def showing(title: str | None) -> Iterator[None]:
    """Show the progress of what the block counts under a title; None: show nothing."""
    token = _title.set(title)
    try:
        yield
    finally:
        _title.reset(token)


def titled(title: str) -> contextlib.AbstractContextManager[None]:
    """Change the title in the block, where progress is shown."""
    return showing(None if _title.get() is None else title)


def counting(total: int, noun: str = "images", unit: str = "img") -> Progress:
    """Return a count under the title of `showing`, shown only inside it."""
    title = _title.get()
    return Progress(f"{title}, {noun}", total, unit, shown=title is not None)


def counted(parts: Iterable, total: int, noun: str, unit: str) -> Iterator:
    """Yield the parts of a loop and count each when the next one is asked for."""
    with counting(total, noun, unit) as progress:
        for part in parts:
            yield part
            progress.add(1)


@contextlib.contextmanager
def whole(total: int) -> Iterator[None]:
    """Count the images of all readings in the block as parts of one total."""
    with counting(total) as progress:
        token = _whole.set(progress)
        try:
            yield
        finally:
            _whole.reset(token)


def images_read(total: int) -> contextlib.AbstractContextManager[Progress]:
    """Return the count of a reading of images: that of `whole` around it, else its own."""
    around = _whole.get()
    return counting(total) if around is None else contextlib.nullcontext(around)


def clock(seconds: float) -> str:
    """Format seconds as 2:10 or 1:02:10."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"

"""Standard output and standard error: every line of the package goes through here, and none can end a run.

A reader may go away (`| head`), a disk with the log may be full, a daemon has no streams, a locale may lack a
character. Nothing heavy is imported: the command line starts with this module.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

FALLBACK_COLUMNS = 80


def print_output(text: str, end: str = "\n") -> None:
    """Print to standard output; never raises."""
    write(sys.stdout, f"{text}{end}")


def print_error(text: str, end: str = "\n") -> None:
    """Print to standard error; never raises."""
    write(sys.stderr, f"{text}{end}")


def print_notice(text: str) -> None:
    """Print one line to standard error, on the first rank only; never raises."""
    if is_first_rank():
        print_error(text)


def is_first_rank() -> bool:
    """Return whether this process prints for its job; RANK counts only where WORLD_SIZE says that there are several."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1") or os.environ.get("RANK", "0") == "0"


def write(stream, text: str) -> Exception | None:
    """Write and flush a text; returns the error if the stream refuses it. Unknown characters become escapes."""
    if stream is None:
        return None
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError, AttributeError) as error:  # gone or full, closed, not a whole stream
        return error
    return None


def is_terminal(stream) -> bool:
    """Return whether a stream is a terminal that can move its cursor."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (OSError, ValueError, AttributeError):
        return False


def columns(stream) -> int:
    """Return the width of a terminal in characters."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or FALLBACK_COLUMNS
    except (OSError, ValueError, AttributeError):
        return FALLBACK_COLUMNS


class SafeStream:
    """A stream whose writes never raise, for everything in the process that prints; `error` is the first failure."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text and return its length, whether or not the stream accepts it."""
        self.error = write(self.stream, text) or self.error
        return len(text)

    def flush(self) -> None:
        """Flush what the stream accepts."""
        self.error = write(self.stream, "") or self.error

    def release(self) -> None:
        """Send what a failed stream still buffers to the null device: Python's last flush would change the status."""
        if self.error is None:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            self.stream.flush()


@contextlib.contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Replace standard output and standard error by safe ones in the block; yields standard output."""
    open_missing()
    with contextlib.ExitStack() as stack:
        safe = {}
        for name in ("stdout", "stderr"):
            original = getattr(sys, name)
            stream = original if original is not None else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            safe[name] = SafeStream(stream)
            setattr(sys, name, safe[name])
            stack.callback(setattr, sys, name, original)
            stack.callback(safe[name].release)
        yield safe["stdout"]


def open_missing() -> None:
    """Open the null device for standard streams that are closed, so that no other file takes their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

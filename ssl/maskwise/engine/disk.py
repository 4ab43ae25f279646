"""Files of a run folder: whole or not there, and what a disk's refusal means to the person at the keyboard."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from maskwise.functional.errors import UserError

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount it writable again",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ESTALE: "mount it anew",
}


def refused(what, error: Exception) -> str:
    """`cannot write WHAT (cause): remedy` for an OSError, or for an error of another library that names its number."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"(?:os error |code: )(\d+)", str(error))):
        number = int(found[1])
    cause = os.strerror(number) if number else " ".join(str(error).split())
    return f"cannot write {what} ({cause}): {REMEDIES.get(number, 'look at the disk and its mount')}"


@contextlib.contextmanager
def whole(path) -> Iterator[Path]:
    """A path to write to in the block; what lies there at its end takes the place of `path`, or is removed when the block fails."""
    path = Path(path)
    aside = path.with_name(f".{path.name}")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except Exception:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_whole(path, text: str) -> None:
    """Replace a text file in one move; raises UserError when the disk refuses."""
    try:
        with whole(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(refused(path, error)) from None


def sync(path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

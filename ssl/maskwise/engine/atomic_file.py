"""Atomic replacement of files, and error lines for disks that refuse a write."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import safetensors

from maskwise.errors import UserError

WRITE_ERRORS = (OSError, safetensors.SafetensorError)  # what a refused write raises
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount it writable again",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ESTALE: "mount it again",
    errno.EEXIST: "a file has the name of a folder here, move it away",
    errno.ENOTDIR: "a file has the name of a folder here, move it away",
    errno.EISDIR: "a folder has the name of this file, move it away",
    errno.ENOENT: "its folder was removed or unmounted, put it back",
}


def write_error(what, error: Exception) -> str:
    """Describe a failed write as `cannot write WHAT (cause): remedy`.

    Accepts an OSError, or an error of another library that contains the error number.
    """
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"(?:os error |code: )(\d+)", str(error))):
        number = int(match[1])
    if number is None and "inline_container" in str(error):  # torch.save names its own source line
        return f"cannot write {what} (it could not be written to its end): {REMEDIES[errno.ENOSPC]} and check the disk"
    cause = os.strerror(number) if number else " ".join(str(error).split())
    return f"cannot write {what} ({cause}): {REMEDIES.get(number, 'check the disk and its mount')}"


@contextlib.contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end of the block, or is removed if the block fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C included
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomic(path, text: str) -> None:
    """Replace a text file atomically; raises UserError if the disk refuses."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(write_error(path, error)) from None


def sync(path) -> None:
    """Sync a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

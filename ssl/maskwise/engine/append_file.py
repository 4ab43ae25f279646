"""Append-only files that lose nothing to a full disk."""

import os
from collections.abc import Callable
from pathlib import Path

from maskwise.engine.atomic_file import write_error


class AppendFile:
    """Append records (bytes) to a file; buffer in memory what the disk refuses and write it first next time.

    keep: bytes of an existing file that stay (default: all). print_line receives one line when the disk starts to
    refuse, and one when everything was written after all. Raises OSError if the file cannot be opened.
    """

    def __init__(self, path, *, keep: int | None = None, print_line: Callable[[str], None] = lambda text: None):
        self.path, self.print_line = Path(path), print_line
        self.unwritten, self.disk_full = b"", False
        self.file = open(self.path, "ab", buffering=0)
        if keep is not None:
            self.file.truncate(keep)

    def write(self, record: bytes) -> None:
        """Append one record, now or later."""
        self.unwritten += record
        self._write_pending()

    def flush(self) -> None:
        """Write and sync everything that the disk accepts."""
        self._write_pending(os.fsync)

    def close(self) -> None:
        """Flush and close; print how much was lost if the disk still refuses."""
        if self.file.closed:
            return
        self.flush()
        if self.unwritten:
            self.print_line(f"could not write the last {len(self.unwritten)} bytes of {self.path}")
        self.file.close()

    def _write_pending(self, sync: Callable[[int], None] | None = None):
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            if sync:
                sync(self.file.fileno())
        except OSError as error:
            if not self.disk_full:
                self.print_line(f"{write_error(self.path, error)}; the data is kept in memory and written later")
            self.disk_full = True
        else:
            if self.disk_full:
                self.print_line(f"{self.path} is writable again, nothing is missing")
            self.disk_full = False

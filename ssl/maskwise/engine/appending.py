"""`Appending`: a file that only grows, and loses nothing to a full disk."""

import os
from collections.abc import Callable
from pathlib import Path

from maskwise.engine.disk import refused


class Appending:
    """A file to which records (bytes) are appended; what the disk refuses is kept in memory and comes first the next time.

    Of a file that is there the first `keep` bytes stay (default: all). `say` is handed one line when the disk begins to
    refuse and one when it has taken everything after all. Raises OSError when the file cannot be opened.
    """

    def __init__(self, path, *, keep: int | None = None, say: Callable[[str], None] = lambda text: None):
        self.path, self.say, self.owed, self.refusing = Path(path), say, b"", False
        self.file = open(self.path, "ab", buffering=0)
        if keep is not None:
            self.file.truncate(keep)

    def write(self, record: bytes) -> None:
        """Append one record, now or later."""
        self.owed += record
        self._settle()

    def flush(self) -> None:
        """Bring everything that the disk takes to the disk."""
        self._settle(os.fsync)

    def close(self) -> None:
        """Flush and close; says what was lost if the disk still refuses."""
        if self.file.closed:
            return
        self.flush()
        if self.owed:
            self.say(f"{len(self.owed)} bytes that belong into {self.path} were never written")
        self.file.close()

    def _settle(self, sync: Callable[[int], None] | None = None):
        try:
            while self.owed:
                self.owed = self.owed[self.file.write(self.owed) :]
            if sync:
                sync(self.file.fileno())
        except OSError as error:
            if not self.refusing:
                self.say(f"{refused(self.path, error)}; what belongs there is kept in memory and written later")
            self.refusing = True
        else:
            if self.refusing:
                self.say(f"{self.path} is written again, nothing is missing")
            self.refusing = False

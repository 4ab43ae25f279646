"""A bounded cache of byte ranges on the local disk, shared by processes."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path

CHECK = 4  # bytes of the checksum before the data
SHARE = 16  # a process counts the whole cache again after it has added this part of the limit


class RangeCache:
    """Keep ranges of files in a folder until `limit` bytes are reached; then nothing is added.

    An epoch reads every image once in a new order, so that what was added last is read last: replacing would only lower
    the share of hits. Ranges of other files, or of an earlier version of a file, are removed when room is needed.
    Several processes may share the folder; each may exceed the limit by a sixteenth. A disk that refuses is no error.
    files: (address, tag) of each file that this process reads.
    """

    def __init__(self, folder: Path, limit: int, files: list[tuple[str, str]]):
        self.folder, self.limit = folder, limit
        self.keys = [hashlib.sha256(f"{address}\0{tag}".encode()).hexdigest()[:24] for address, tag in files]
        self.room: int | None = None  # bytes that may be added before the folder is counted again
        self.full = False

    def get(self, number: int, start: int, size: int) -> bytes | None:
        """Return a range of file `number`, None where it is not there or damaged."""
        try:
            with open(self._path(number, start, size), "rb") as file:
                stored = file.read()
        except OSError:
            return None
        data = stored[CHECK:]
        sound = len(data) == size and zlib.crc32(data).to_bytes(CHECK, "little") == stored[:CHECK]
        return data if sound else None

    def put(self, number: int, start: int, data: bytes) -> None:
        """Keep a range of file `number` if there is room."""
        if self.full or not self._has_room(len(data) + CHECK):
            return
        path = self._path(number, start, len(data))
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
            with open(handle, "wb") as file:
                file.write(zlib.crc32(data).to_bytes(CHECK, "little") + data)
            os.replace(temporary, path)
        except OSError:
            self.full = True
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _path(self, number: int, start: int, size: int) -> Path:
        return self.folder / self.keys[number] / f"{start % 251:02x}" / f"{start}_{size}"

    def _has_room(self, size: int) -> bool:
        if self.room is None or self.room < size:
            used = total(self.folder)
            if used + size > self.limit:
                self._remove_others()
                used = total(self.folder)
            self.full = used + size > self.limit
            self.room = min(self.limit - used, max(size, self.limit // SHARE))
        if self.full:
            return False
        self.room -= size
        return True

    def _remove_others(self) -> None:
        mine = set(self.keys)
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self.folder)):
                if entry.name not in mine:
                    shutil.rmtree(entry.path, ignore_errors=True)


def total(folder: Path) -> int:
    """Return the bytes of all files below a folder; files that vanish meanwhile count nothing."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(place, name)).st_size
    return size

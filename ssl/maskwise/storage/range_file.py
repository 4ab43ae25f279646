"""A file in storage as a seekable stream."""

import io

from maskwise.storage.store import Store

FIRST, LARGEST = 1 << 16, 1 << 22  # bytes of a block: it doubles while reading goes on, and starts again after a jump


class RangeFile(io.RawIOBase):
    """Read a file of `size` bytes by ranges, a block ahead; `.requests` counts the ranges."""

    def __init__(self, store: Store, address: str, size: int):
        self.store, self.address, self.size = store, address, size
        self.place, self.start, self.block = 0, 0, b""
        self.length, self.requests = FIRST, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it; nothing is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, base + offset)
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, fewer at the end only; -1: the rest."""
        end = self.size if size is None or size < 0 else min(self.size, self.place + size)
        parts = []
        while self.place < end:
            if not self.start <= self.place < self.start + len(self.block):
                self._fetch(end)
            part = self.block[self.place - self.start : end - self.start]
            parts.append(part)
            self.place += len(part)
        return b"".join(parts)

    def readinto(self, buffer) -> int:
        """Read into a buffer and return the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _fetch(self, end: int) -> None:
        near = self.place - (self.start + len(self.block))
        self.length = min(LARGEST, 2 * self.length) if 0 <= near < self.length else FIRST
        count = min(self.size - self.place, max(self.length, min(end - self.place, LARGEST)))
        self.start, self.block = self.place, self.store.read(self.address, self.place, count)
        self.requests += 1

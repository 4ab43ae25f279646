"""Contents of a dataset as digests: cheap for millions of images, and the same in any place."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from maskwise.data.datasets.packed_strings import PackedStrings

# files whose sizes and first bytes are read, evenly spread: a million would take minutes on a network disk
SAMPLED, OPENED, FIRST_BYTES = 10_000, 16, 1 << 16


def contents(dataset) -> dict[str, int | str]:
    """Return the number of images, and a digest of each part that the dataset describes, such as names and sizes."""
    describe = getattr(dataset, "contents", None)
    return {"count": len(dataset), **(describe() if describe is not None else {})}


def digest(*parts: bytes | str) -> str:
    """Return sixteen hex digits of some parts; where one ends and the next begins counts."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


def names_digest(names: Iterable[str]) -> str:
    """Return a digest of names in their order."""
    packed = names if isinstance(names, PackedStrings) else PackedStrings.of(names)
    return digest(packed.blob, np.asarray(packed.ends, dtype="<i8").tobytes())


def sizes_digest(root: Path, files: Sequence[str]) -> str:
    """Return a digest of the sizes in bytes of at most SAMPLED files under a root."""
    return numbers_digest(size(root / files[row]) for row in sampled(len(files)))


def bytes_digest(root: Path, files: Sequence[str]) -> str:
    """Return a digest of the beginning of a few files; frames of a video may all have the same names and sizes."""
    return digest(*(beginning(root / files[row]) for row in sampled(len(files), OPENED)))


def beginning(path: Path) -> bytes:
    """Return the first bytes of a regular file, none where it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            return b""
        with open(path, "rb") as file:
            return file.read(FIRST_BYTES)
    except (OSError, ValueError):
        return b""


def numbers_digest(numbers: Iterable[int]) -> str:
    """Return a digest of whole numbers."""
    return digest(np.fromiter(numbers, dtype="<i8").tobytes())


def sampled(count: int, at_most: int = SAMPLED) -> list[int]:
    """Return the rows of all images, or of `at_most` of them, evenly spread."""
    return list(range(count)) if count <= at_most else [k * count // at_most for k in range(at_most)]


def size(path: Path) -> int:
    """Return the size of a file in bytes, -1 where it is missing, which is reported when it is read."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return -1

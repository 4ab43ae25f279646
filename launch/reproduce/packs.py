"""Image packs, unpacked once into a working folder."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `place` at the end, so that no part of one is found there."""
    temporary = place.with_name(f".{place.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(place)


def unpack(pack: Path, work: Path) -> Path:
    """Return the folder that a pack (.tar.xz) holds, unpacked once below `work`."""
    place = work / "packs" / pack.name.removesuffix(".tar.xz")
    if not place.is_dir():
        with new_folder(place) as folder, tarfile.open(pack) as archive:
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder for folder in sorted(place.iterdir()) if folder.is_dir())

"""Real images for tests: packs under ../shared/data (or $MASKWISE_PACKS), unpacked once outside the repository."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def archive(name: str) -> Path:
    """Return the file of a data pack; skip the test if the pack is missing."""
    source = Path(os.environ.get("MASKWISE_PACKS") or REPOSITORY.parent / "shared" / "data") / f"{name}.tar.xz"
    if not source.is_file():
        pytest.skip(f"data pack {name} is missing in {source.parent}; set MASKWISE_PACKS to its folder")
    return source


def unpack(name: str) -> Path:
    """Return the folder of a data pack; skip the test if the pack is missing."""
    source = archive(name)
    place = Path(tempfile.gettempdir()) / "maskwise-packs" / f"{name}-{source.stat().st_size}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=place.parent))
        with tarfile.open(source) as pack:
            pack.extractall(temporary, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        try:
            temporary.rename(place)
        except OSError:  # another process unpacked it first
            shutil.rmtree(temporary, ignore_errors=True)
    return next(folder for folder in sorted(place.iterdir()) if folder.is_dir())

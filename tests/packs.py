"""Real images for tests: packs under ../shared/data (or $MASKWISE_PACKS), unpacked once outside the repository."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def unpack(name: str) -> Path:
    """The folder that a pack holds; skips the test where the pack is not at hand."""
    source = Path(os.environ.get("MASKWISE_PACKS") or REPOSITORY.parent / "shared" / "data") / f"{name}.tar.xz"
    if not source.is_file():
        pytest.skip(f"data pack {name} is not at hand (looked in {source.parent}; MASKWISE_PACKS names another folder)")
    place = Path(tempfile.gettempdir()) / "maskwise-packs" / f"{name}-{source.stat().st_size}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=place.parent))
        with tarfile.open(source) as pack:
            pack.extractall(aside, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        try:
            aside.rename(place)
        except OSError:  # another process was first
            shutil.rmtree(aside, ignore_errors=True)
    return next(folder for folder in sorted(place.iterdir()) if folder.is_dir())

"""ADE20K scene parsing: images and label maps of 150 classes."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.benchmark_sets.label_maps import LabelMaps
from maskwise.data.benchmark_sets.listed_files import find_root, require_files

CLASSES = 150


def matches(folder: Path) -> bool:
    """Return whether a folder, or its ADEChallengeData2016, has label maps."""
    return (find_root(folder, "ADEChallengeData2016") / "annotations" / "validation").is_dir()


def read(folder) -> dict:
    """Read `{images,annotations}/{training,validation}/ADE_*.{jpg,png}` -> {"train", "test"}.

    Label 0, "other", is unlabeled, and 1..150 are classes 0..149. Raises UserError for missing files.
    """
    root = require_files(
        "ADE20K",
        find_root(folder, "ADEChallengeData2016"),
        "images/training",
        "images/validation",
        "annotations/training",
        "annotations/validation",
    )
    data = {}
    for role, part in (("train", "training"), ("test", "validation")):
        names = sorted(file.name for file in (root / "images" / part).glob("*.jpg"))
        maps = [root / "annotations" / part / f"{Path(name).stem}.png" for name in names]
        data[role] = LabelMaps("ADE20K", root / "images" / part, names, maps=maps, first=1, class_count=CLASSES)
    return data

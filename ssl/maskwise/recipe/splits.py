"""Subfolders of data.path: those that a recipe names for any data are used where the folder has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskwise.data.datasets.folder import TEST_NAMES, TRAIN_NAMES
from maskwise.recipe.yaml_text import Entry

EVALUATIONS = {"evaluate.knn_every": 0, "evaluate.top1_every": 0, "evaluate.also": None}


def absent_splits(values: Mapping[str, Any], layers: list[dict[str, Entry]]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a recipe whose folders lack the subfolders that it names, and lines that say so.

    Only of subfolders written before the path, as in a shipped recipe; without test images evaluations written before
    the path are switched off. A folder with subfolders of similar names (training, Val) is left to the dataset's error.
    """
    path, test_path = values.get("data.path"), values.get("data.test_path")
    if values["data.name"] != "folder":
        return {}, []
    changed: dict[str, Any] = {}
    lines = []
    if lacks(values, layers, "data.split", "data.path"):
        changed["data.split"] = None
        lines.append(f"{path} has no subfolder {values['data.split']}/: the images in it are the training images")
    if test_path is not None and lacks(values, layers, "data.test_split", "data.test_path"):
        changed["data.test_split"] = None
        lines.append(f"{test_path} has no subfolder {values['data.test_split']}/: the images in it are the test images")
    elif test_path is None and lacks(values, layers, "data.test_split", "data.path"):
        changed["data.test_split"] = None
        instead = "nothing is evaluated during training"
        if values.get("data.holdout") is not None:
            instead = "a part of the training images is held out for evaluations"
        else:
            changed |= {
                key: off for key, off in EVALUATIONS.items() if values.get(key) and earlier(layers, key, "data.path")
            }
        lines.append(f"{path} has no subfolder {values['data.test_split']}/: {instead}")
    return changed, lines


def lacks(values: Mapping[str, Any], layers: list[dict[str, Entry]], split: str, path: str) -> bool:
    """Whether a folder given after the name of its subfolder has neither that nor one of a similar name."""
    if not values.get(split) or not values.get(path) or not earlier(layers, split, path):
        return False
    root = Path(values[path]).expanduser()
    if not root.is_dir() or (root / values[split]).is_dir():
        return False
    similar = TEST_NAMES if split == "data.test_split" else (*TRAIN_NAMES, *TEST_NAMES)
    return not any(entry.name.lower() in similar for entry in root.iterdir() if entry.is_dir())


def earlier(layers: list[dict[str, Entry]], key: str, than: str) -> bool:
    """Whether a key was last written in an earlier layer than another, or nowhere."""
    places = {name: max((i for i, layer in enumerate(layers) if name in layer), default=-1) for name in (key, than)}
    return places[key] < places[than]

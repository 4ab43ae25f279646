"""Images given by path, as datasets."""

from __future__ import annotations

import os
from pathlib import Path

from maskwise.data.datasets import DATASETS
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.signatures import parameters_of
from maskwise.storage.address import is_remote


def images_at(path, split: str | None = None, channels: int = 3, value_range: tuple[float, float] | None = None):
    """Open a folder or list file as a dataset; a dataset is returned unchanged. Raises UserError for anything else."""
    if hasattr(path, "image"):
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(
            "images are a folder, a list file, or a dataset with image(i), name(i), labels and fingerprint(); "
            f"this is a {type(path).__name__}"
        )
    kind = "list" if Path(path).expanduser().is_file() else "folder"
    return DATASETS[kind](path=path, split=split, channels=channels, value_range=value_range)


def opened_images(path, model=None, channels: int = 3, *, name: str | None = None, **options):
    """Open images by an entry of DATASETS and its options: by default a folder, list or tar file, or `shapes`.

    model: a run folder, whose data.value_range is used. A dataset is returned unchanged. Raises UserError where there
    is nothing to open.
    """
    if hasattr(path, "image"):
        return path
    name = name or images_kind(path)
    if name not in DATASETS:
        raise UserError(f"data.name={name} is unknown; choose {', '.join(DATASETS)}")
    cls = DATASETS[name]
    takes = parameters_of(cls)[0]
    own = {"path": path, "channels": channels, "value_range": value_range_of(model)}
    return cls(**{key: value for key, value in own.items() if key in takes}, **options)


def images_kind(path) -> str:
    """Return the entry of DATASETS that reads a path, told by what is there and by its ending."""
    text = str(path)
    if text == "shapes" and not Path(text).exists():
        return "shapes"
    if text.lower().endswith(".tar"):
        return "tar"
    if is_remote(text) and text.lower().endswith(".parquet"):
        return "huggingface"
    return "list" if Path(text).expanduser().is_file() else "folder"


def value_range_of(model) -> tuple[float, float] | None:
    """Return data.value_range of a run folder, with which its images are read; None for other models."""
    if not isinstance(model, (str, Path)) or not (Path(model).expanduser() / "recipe.yaml").is_file():
        return None
    return read_recipe(Path(model).expanduser()).data.keywords().get("value_range")

"""Images given by path, or as datasets of the user, as datasets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskwise.data.datasets import DATASETS, TorchDataset
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.signatures import parameters_of
from maskwise.storage.address import is_remote

GIVEN = "python"  # the entry of DATASETS for images given in Python
OF_ANY_DATA = (
    "holdout",
    "corrupt_ceiling",
    "decoder",
    "jpeg_scaling",
    "mean",
    "std",
)  # keys of section data that these images have too


@dataclass(frozen=True)
class Given:
    """Objects of the user for a run: training and test images, and a transform in place of multi-crop."""

    dataset: Any = None
    test: Any = None
    transform: Callable | None = None


def images_at(path, split: str | None = None, channels: int = 3, value_range: tuple[float, float] | None = None):
    """Open a folder, list file or torch dataset as a dataset; one of ours is returned unchanged.

    Raises UserError for anything else.
    """
    if not isinstance(path, (str, os.PathLike)):
        return given_images(path, channels)
    kind = "list" if Path(path).expanduser().is_file() else "folder"
    return DATASETS[kind](path=path, split=split, channels=channels, value_range=value_range)


def opened_images(path, model=None, channels: int = 3, *, name: str | None = None, **options):
    """Open images by an entry of DATASETS and its options: by default a folder, list or tar file, or `shapes`.

    model: a run folder, whose data.value_range is used. A dataset is returned unchanged. Raises UserError where there
    is nothing to open.
    """
    if not isinstance(path, (str, os.PathLike)):
        return given_images(path, channels)
    name = name or images_kind(path)
    if name not in DATASETS:
        raise UserError(f"data.name={name} is unknown; choose {', '.join(DATASETS)}")
    cls = DATASETS[name]
    takes = parameters_of(cls)[0]
    own = {"path": path, "channels": channels, "value_range": value_range_of(model)}
    return cls(**{key: value for key, value in own.items() if key in takes}, **options)


def given_images(dataset, channels: int = 3):
    """Return a dataset of ours as it is, and a torch dataset wrapped. Raises UserError for anything else."""
    if hasattr(dataset, "image") and hasattr(dataset, "name"):
        return dataset
    if dataset is None or isinstance(dataset, (list, tuple)) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            "images are a folder, a list file, or a dataset with __len__ and __getitem__ such as one of torch; "
            f"this is a {type(dataset).__name__}"
        )
    return TorchDataset(dataset, channels=channels)


def recipe_of_given(recipe: Recipe) -> Recipe:
    """Return a recipe with data.name=python; keys of section data that only other datasets have are dropped."""
    if recipe.data.name == GIVEN:
        return recipe
    kept = {f"data.{key}" for key in OF_ANY_DATA}
    values = {key: value for key, value in recipe.values.items() if not key.startswith("data.") or key in kept}
    before = list(recipe.values)
    values["data.name"] = GIVEN
    order = sorted(values, key=before.index)
    origins = {**recipe.origins, "data.name": "given in Python"}
    about = {"source": recipe.source, "origins": origins, "intended": recipe.intended, "notes": recipe.notes}
    return Recipe.of({key: values[key] for key in order}, **about)


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

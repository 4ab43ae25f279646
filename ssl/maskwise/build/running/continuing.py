"""Continuing a run: which values and images may differ between its starts, and the line for those that may not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maskwise.build.running.run_folder import read_run
from maskwise.data.class_matching import class_names
from maskwise.data.datasets.contents import contents, digest
from maskwise.data.datasets.files import local_path
from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.subset import Subset
from maskwise.data.own_crops import title
from maskwise.engine.atomic_file import write_atomic
from maskwise.errors import UserError
from maskwise.export.initial_model import InitialModel
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe
from maskwise.storage.address import is_remote

# keys that change nothing that is computed: where the images are, when something is saved, logged or evaluated
PLACES = ("data.path", "data.root", "data.split", "data.classes")  # while the images are the same
FREE = (
    *("data.test_path", "data.test_split", "data.corrupt_ceiling"),
    *("train.log_every", "train.save_every", "train.keep", "train.max_bad_steps", "train.mirror", "train.loggers"),
    "method.model",  # a teacher in another place: checkpoints hold the digest of its weights
)
FREE_SECTION = "evaluate."
START_MODEL = "method.start_from"  # another place of the same file
PARTS = {
    "names": "other file names",
    "sizes": "files of other sizes",
    "bytes": "other contents",
    "pixels": "other pixels",
    "settings": "other settings",
    "classes": "other classes",
    "labels": "other labels",
    "rows": "other images held out",
}

Changes = dict[str, tuple[str, str]]  # key -> (before, now), as YAML


@dataclass(frozen=True)
class EarlierRun:
    """A run found in the folder: its run.json ({} for a new run), and what differs at this start.

    images: contents of the training images now; other_images: whether they differ from those of the last start;
    changes: values that may change; notes: lines on the place of the run folder.
    """

    record: dict
    images: dict
    other_images: bool = False
    changes: Changes = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def about(self) -> dict:
        """Return the differences for this start's entry in run.json."""
        changes = {"changed": {key: list(values) for key, values in self.changes.items()}} if self.changes else {}
        return changes | ({"data": self.images} if self.other_images else {})

    def lines(self) -> list[str]:
        """Return the lines to print."""
        lines = list(self.notes)
        if self.changes:
            changes = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in self.changes.items())
            lines.append(f"changed since the last start: {changes}")
        if self.other_images:
            before = last_images(self.record)["count"]
            lines.append(
                f"the images changed since the last start ({self.images['count']}, before {before}); an epoch stays "
                f"that of {self.record['images']} images"
            )
        return lines

    def update(self, folder: Path, recipe: Recipe) -> None:
        """Write the recipe with the changed values."""
        if self.changes:
            write_atomic(folder / "recipe.yaml", recipe.resolved_yaml())


def training_images(recipe: Recipe, data) -> dict:
    """Return the contents of the training images, with classes and labels where the method learns these."""
    if not recipe.learns_labels or data.labels is None:
        return contents(data)
    labels = np.asarray(data.labels, dtype="<i8").tobytes()
    return {**contents(data), "classes": digest(*(class_names(data) or ())), "labels": digest(labels)}


def run_in_data(folder: Path, recipe: Recipe, data) -> list[str]:
    """Return a line on a run folder in the folder of its images; later starts will not look for images there.

    Raises UserError where the run's pictures would become images.
    """
    data = data.dataset if isinstance(data, Subset) else data  # a part of it is held out
    by_library = recipe.data.name == "huggingface"  # it reads all images below its folder
    if is_remote(recipe.values.get("data.path")):
        return []
    if not by_library and not isinstance(data, Folder):
        return []
    root = local_path(recipe.values["data.path"]) if by_library else data.root
    place, images = os.path.realpath(folder), os.path.realpath(root)
    if place == images or by_library and place.startswith(images + os.sep):
        raise UserError(f"--out {folder} lies in the folder of the images, {root}: give one beside it")
    if place.startswith(images + os.sep):
        return [f"{folder} lies in the folder of the images; run folders are left out of them"]
    return []


def earlier_run(folder: Path, recipe: Recipe, data, *, accept_changed_data: bool = False) -> EarlierRun:
    """Return the run in a folder that this recipe continues on these training images.

    Raises UserError, with the differences, for a run of another recipe or, unless they are accepted, on other images.
    """
    record, images, notes = read_run(folder), training_images(recipe, data), run_in_data(folder, recipe, data)
    if not (folder / "recipe.yaml").is_file():
        return EarlierRun({}, images, notes=notes)
    before = read_recipe(folder, trusted=recipe.code())
    changes = before.changes(recipe)
    known = last_images(record)
    differences = differing(known, images)
    movable = accept_changed_data or len(known.keys() & images.keys()) > 1  # a number alone identifies no images
    moved = [key for key in changes if key in PLACES and (differences or movable)]
    refused = {key: change for key, change in changes.items() if key not in moved and not is_free(key)}
    if START_MODEL in refused and same_model(record, recipe):
        del refused[START_MODEL]
    if refused:
        raise UserError(changed_message(folder, refused))
    if differences and not accept_changed_data:
        raise UserError(images_message(folder, before, recipe, known, images, differences))
    if "classes" in differences:
        raise UserError(f"{folder} was trained on other classes than these: give another --out")
    return EarlierRun(record, images, bool(differences), changes, notes)


def check_same_transform(folder: Path, record: dict, transform: Callable | None) -> None:
    """Raise UserError where a run is continued with another transform than it began with, or without one."""
    before, now = record.get("transform"), title(transform)
    if record and before != now:
        was, given = (f"transform {name}" if name else "multi-crop" for name in (before, now))
        raise UserError(f"{folder} was trained with {was}, not {given}: give the same, or another --out")


def is_free(key: str) -> bool:
    """Whether a value may change between the starts of a run."""
    return key in FREE or key.startswith(FREE_SECTION)


def last_images(record: dict) -> dict:
    """Return the contents of the images at the last start; of an earlier version's run their number alone."""
    for start in reversed(record.get("starts", [])):
        if "data" in start:
            return start["data"]
    return record.get("data") or ({"count": record["images"]} if "images" in record else {})


def differing(before: dict, now: dict) -> list[str]:
    """Return the parts in which images differ, of those known at both starts."""
    return [part for part in before if part in now and before[part] != now[part]]


def same_model(record: dict, recipe: Recipe) -> bool:
    """Whether the recipe continues from the same model as the run, in another place."""
    known, name = record.get("start"), recipe.method.start_from
    if not known or name is None:
        return False
    gamma = recipe.pooling.keywords().get("gamma", 1.25)
    return InitialModel.open(name, backbone=recipe.backbone.name, gamma=gamma).digest == known["sha256"]


def images_message(folder: Path, before: Recipe, recipe: Recipe, known: dict, images: dict, parts: list[str]) -> str:
    """Describe other images than a run was trained on, and the remedies."""
    here, there = (str(one.values.get("data.path", one.data.name)) for one in (recipe, before))
    if "count" in parts:
        difference = f"{images['count']} images, not {known['count']}"
    else:
        difference = PARTS.get(parts[0], parts[0])
    changed = f"the images in {here} have changed since {folder} was trained on them ({difference})"
    if here != there:
        changed = f"{folder} was trained on the images in {there}, and {here} has others ({difference})"
    return (
        f"{changed}: bring the earlier images back, give another --out, or continue with these by "
        "--accept-changed-data (the length of an epoch stays)"
    )


def changed_message(folder: Path, changes: Changes) -> str:
    """Describe the values that a run was not trained with, and the remedy."""
    if changes.keys() == {"train.epochs"} and int(changes["train.epochs"][0]) < int(changes["train.epochs"][1]):
        before, after = changes["train.epochs"]
        return (
            f"{folder} was trained with train.epochs={before}. To train longer, extend it: "
            f"maskwise train {folder} --epochs {after} --out {next_name(folder)}"
        )
    values = ", ".join(f"{key}={before}, not {after}" for key, (before, after) in changes.items())
    return f"{folder} was trained with {values}: give the same recipe, or another --out"


def next_name(folder: Path) -> str:
    """Return a name for a run that follows: runs/r0 -> runs/r1, runs/demo -> runs/demo_2."""
    stem, number = re.fullmatch(r"(.*?)(\d*)", str(folder)).groups()
    return f"{stem}{int(number) + 1}" if number else f"{stem}_2"

"""Classes of labeled pixels, and confusion matrices over whole sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.data.benchmark_sets import ade20k, label_maps
from maskwise.data.benchmark_sets.label_maps import IGNORED
from maskwise.errors import UserError
from maskwise.evaluation.protocol import ROLES, as_tuple
from maskwise.evaluation.scoring.library_metrics import confusion
from maskwise.functional.metrics import segmentation_scores

_CELLS = 1 << 25


def read(folder) -> dict:
    """Read ADE20K or a folder of images/ and labels/ -> {"train", "test"} or {"test"}, {} for any other folder."""
    for layout in (ade20k, label_maps):
        if layout.matches(Path(folder)):
            return layout.read(folder)
    return {}


def read_train(folder) -> dict:
    """Read the training images of such a folder -> {"train"}: of a folder without splits all."""
    sets = read(folder)
    return {"train": sets.get("train", sets["test"])} if sets else {}


@dataclasses.dataclass(frozen=True)
class Classes:
    """The labels that are scored, in order; names by label, or None."""

    values: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def index(self, labels: Tensor) -> Tensor:
        """Number labels [H, W] 0 to C - 1, 255 where they are not scored."""
        table = torch.full((256,), IGNORED)
        table[list(self.values)] = torch.arange(len(self.values))
        return table[labels]

    def name(self, number: int) -> str:
        """Return the name of class `number`, or its label."""
        label = self.values[number]
        return self.names[label] if self.names and label < len(self.names) else str(label)


def scored_classes(evaluation: str, data: dict, roles: Sequence[str], ignored=None) -> Classes:
    """Return the classes of sets with label maps: as many as they state, else the labels in all maps.

    ignored: labels that are left out. Raises UserError for sets without label maps.
    """
    for role in roles:
        if not hasattr(data.get(role), "label_map"):
            raise UserError(
                f"{evaluation}: {ROLES[role]} have no label maps; give {role}=FOLDER that holds images/ and labels/ "
                "(one PNG of class numbers per image), or ADE20K"
            )
    stated = [getattr(data[role], "class_count", None) for role in roles]
    if any(stated):
        found = set(range(max(filter(None, stated))))
    else:
        found = set()
        for role in roles:
            for i in range(len(data[role])):
                found |= set(data[role].label_map(i).unique().tolist())
    left_out = {IGNORED} if ignored is None else {IGNORED, *as_tuple(ignored)}
    values = tuple(sorted(found - left_out))
    if len(values) < 2:
        raise UserError(f"{evaluation}: the label maps hold {len(values)} classes; give at least two")
    names = getattr(data[roles[-1]], "class_names", None)
    return Classes(values, None if names is None else tuple(names))


def count_pixels(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Count labeled pixels by true class (rows) and prediction (columns): [H, W] each -> int64 [C, C]."""
    inside = truth != IGNORED
    return confusion(predicted.cpu()[inside], truth[inside], classes)


def largest_class(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate scores [C, h, w] to size (H, W) and return the class of the largest, int64 [H, W].

    Classes are interpolated a few at a time, so that memory is bounded.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    place = torch.zeros(size, dtype=torch.int64, device=scores.device)
    start = 0
    for part in scores.float().split(max(1, _CELLS // (size[0] * size[1]))):
        large = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0]
        value, index = large.max(dim=0)
        higher = value > best
        best, place = torch.where(higher, value, best), torch.where(higher, index + start, place)
        start += len(part)
    return place


def numbers_of(table: Tensor) -> dict[str, float]:
    """Return mean IoU, mean accuracy and pixel accuracy of a confusion matrix, in per cent."""
    scores = segmentation_scores(table)
    return {name: 100 * scores[name] for name in ("miou", "macc", "aacc")}


def iou_of_classes(table: Tensor, classes: Classes) -> dict[str, float]:
    """Return the IoU of each class that occurs or is predicted, by name, in per cent."""
    iou = segmentation_scores(table)["iou"]
    return {classes.name(i): round(100 * float(value), 2) for i, value in enumerate(iou) if not value.isnan()}

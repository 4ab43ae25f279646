"""Matching of the classes of two labeled sets, by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from maskwise.data.benchmark_sets import imagenet
from maskwise.data.datasets.files import join_names
from maskwise.errors import UserError


def match_classes(names: Sequence[str], known: Sequence[str]) -> Tensor:
    """Find class names among known ones -> int64 [len(names)], -1 for an unknown name.

    Names are equal as they are, or in Unicode's composed form (NFC): file systems store either form. Where that leaves
    names unknown, numbers match by value if all names of both are numbers ("07", "7"), and WordNet ids match ImageNet
    indices 0..999.
    """
    names, known = list(map(str, names)), list(map(str, known))
    position = {composed(name): place for place, name in reversed(list(enumerate(known)))}
    position |= {name: place for place, name in enumerate(known)}
    places = [position.get(name, position.get(composed(name), -1)) for name in names]
    if -1 in places:
        for convert in (whole_numbers, imagenet.indices):
            wanted, stored = convert(names), convert(known)
            if wanted is not None and stored is not None:
                position = {int(number): place for place, number in enumerate(stored)}
                places = [position.get(int(number), -1) for number in wanted]
                break
    return torch.tensor(places, dtype=torch.int64)


def composed(name: str) -> str:
    """Return a name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


def whole_numbers(names: Sequence[str]) -> list[int] | None:
    """Return names as numbers, None where one is not a number in digits."""
    return [int(name) for name in names] if all(name.isdecimal() for name in names) else None


def class_names(dataset) -> list[str] | None:
    """Return the class names of a dataset, None where it has none."""
    names = getattr(dataset, "classes", None)
    return list(map(str, names)) if names is not None and len(names) else None


def present_classes(dataset) -> tuple[Tensor, list[str]]:
    """Return the labels that occur in a dataset, int64 [c] in order, and their names (the number where it has none)."""
    labels, names = torch.unique(torch.as_tensor(dataset.labels, dtype=torch.int64)), class_names(dataset) or []
    return labels, [names[label] if 0 <= label < len(names) else str(label) for label in labels.tolist()]


def unknown_classes(dataset, reference) -> list[str]:
    """Return the classes with images that another labeled set does not have; none where one set has no names."""
    known = class_names(reference)
    if known is None or class_names(dataset) is None:
        return []
    names = present_classes(dataset)[1]
    return [name for name, place in zip(names, match_classes(names, known).tolist()) if place < 0]


def numbered_like(dataset, reference, where: str, what: str = "the test images", others: str = "the training images"):
    """Return a dataset with its classes numbered as those of the same names in another; itself where they are.

    Without class names in both, numbers are compared. Raises UserError that names the classes with images that the
    reference lacks; where, what and others: the evaluation and the two sets in that message.
    """
    known = class_names(reference)
    if known is None or class_names(dataset) is None:
        return dataset
    if unknown := unknown_classes(dataset, reference):
        root = getattr(dataset, "root", None)
        place = "" if root is None else f" ({root})"
        count = "1 class" if len(unknown) == 1 else f"{len(unknown)} classes"
        raise UserError(
            f"{where}: {what}{place} have {count} unknown to {others}: {join_names(unknown)}; "
            "give both the same class names, or leave these classes out"
        )
    labels, names = present_classes(dataset)
    places = match_classes(names, known)
    if torch.equal(places, labels):
        return dataset
    table = torch.zeros(int(labels.max()) + 1, dtype=torch.int64)
    table[labels] = places
    return Renumbered(dataset, table[torch.as_tensor(dataset.labels, dtype=torch.int64)], known)


class Renumbered:
    """A dataset with labels int64 [n] and class names of another numbering; all else is the dataset's own."""

    def __init__(self, dataset, labels: Tensor, classes: list[str]):
        self.dataset, self.labels, self.classes = dataset, labels, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str):
        if name == "dataset":  # not set yet while a copy is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

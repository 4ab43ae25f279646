"""Near-duplicates within a set and between two sets: pairs, groups, and the list of images to keep."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.datasets.list_file import PLAIN
from maskwise.embedding.neighbors import components, pairs_above
from maskwise.embedding.pages import Figure, page
from maskwise.embedding.reader import Embeddings
from maskwise.engine.atomic_file import write_atomic
from maskwise.errors import UserError

TRAIN, TEST = "train", "test"
MOST_PAIRS_PER_IMAGE, LEAST_LIMIT = 20, 1000  # more pairs than that are no copies: the threshold is too low
PAGE_GROUPS, PAGE_FIGURES = 200, 12  # shown on a page, and of a group
LIST_SUFFIXES = (*PLAIN, ".csv")


@dataclass(frozen=True)
class Duplicates:
    """Groups of near-duplicates among training images 0..n-1 and test images n..n+m-1.

    pairs: (i, j) -> cosine, i < j; groups: connected components; kept: the training images that stay.
    """

    train: Embeddings
    test: Embeddings | None
    threshold: float
    pairs: dict[tuple[int, int], float]
    groups: list[list[int]]
    kept: list[int]

    @property
    def leaks(self) -> list[tuple[int, int]]:
        """Pairs of a training and a test image."""
        return [pair for pair in self.pairs if pair[1] >= len(self.train) > pair[0]]

    def place(self, node: int) -> tuple[str, Embeddings, int]:
        """Return set, embeddings and row of an image."""
        count = len(self.train)
        return (TRAIN, self.train, node) if node < count else (TEST, self.test, node - count)

    def best(self) -> dict[int, float]:
        """Return the highest cosine of each image of a group."""
        best: dict[int, float] = {}
        for pair, cosine in self.pairs.items():
            for node in pair:
                best[node] = max(cosine, best.get(node, -1.0))
        return best

    def rows(self) -> Iterator[dict]:
        """Iterate over the images of all groups: group, set, path, width, height, similarity, kept."""
        best, kept = self.best(), set(self.kept)
        for number, group in enumerate(self.groups, 1):
            for node in group:
                name, images, row = self.place(node)
                width, height = images.sizes[row].tolist()
                yield {
                    "group": number,
                    "set": name,
                    "path": images.paths[row],
                    "width": width,
                    "height": height,
                    "similarity": round(best[node], 6),
                    "kept": "yes" if name == TEST or node in kept else "no",
                }

    def summary(self) -> dict:
        """Return the counts."""
        return {
            "threshold": self.threshold,
            "train": len(self.train),
            "test": 0 if self.test is None else len(self.test),
            "pairs": len(self.pairs) - len(self.leaks),
            "leaks": len(self.leaks),
            "groups": len(self.groups),
            "removed": len(self.train) - len(self.kept),
        }


def duplicates(
    train: Embeddings,
    test: Embeddings | None,
    threshold: float,
    views: Sequence[Callable[[], tuple[Tensor, Tensor]]] = (),
    **search,
) -> Duplicates:
    """Find all pairs within the training images, and between them and the test images, of at least this cosine.

    views: functions that return further vectors of the training images [v, D] and their rows int64 [v], such as those
    of mirrored images; each is compared with all vectors, and a pair has its highest cosine. search: engine and device
    of `pairs_above`. In a group with a test image every training image is removed, else all but the one with the most
    pixels, the first of several. Raises UserError for a threshold outside (0, 1], and for one that very many pairs
    reach.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold:g} is no cosine above 0 and at most 1; give one such as 0.95")
    found = Pairs(len(train), 0 if test is None else len(test), threshold)
    found.add(pairs_above(train.vectors, None, threshold, **search))
    if test is not None:
        found.add(pairs_above(train.vectors, test.vectors, threshold, **search), right=len(train))
    for view in views:
        vectors, rows = view()
        found.add(pairs_above(vectors, train.vectors, threshold, **search), rows)
        if test is not None:
            found.add(pairs_above(vectors, test.vectors, threshold, **search), rows, right=len(train))
    pairs = dict(sorted(found.pairs.items()))
    groups = components(found.count, list(pairs))
    return Duplicates(train, test, threshold, pairs, groups, kept(train, groups))


class Pairs:
    """Pairs of images with their highest cosine, at most so many that they can be copies."""

    def __init__(self, train: int, test: int, threshold: float):
        self.count, self.threshold = train + test, threshold
        self.limit = max(LEAST_LIMIT, MOST_PAIRS_PER_IMAGE * self.count)
        self.pairs: dict[tuple[int, int], float] = {}

    def add(self, blocks, rows: Tensor | None = None, right: int = 0) -> None:
        """Add pairs of left and right rows; rows: the image of each left row; right: the first right image.

        Raises UserError for more pairs than the limit.
        """
        for i, j, cosine in blocks:
            images = i if rows is None else rows[i]
            for a, b, value in zip(images.tolist(), (j + right).tolist(), cosine.tolist()):
                if a != b:
                    pair = (min(a, b), max(a, b))
                    self.pairs[pair] = max(value, self.pairs.get(pair, -1.0))
            if len(self.pairs) > self.limit:
                raise UserError(
                    f"more than {self.limit} pairs of {self.count} images reach threshold={self.threshold:g}, too many "
                    "for copies; give a higher threshold, or a model that tells these images apart"
                )


def kept(train: Embeddings, groups: list[list[int]]) -> list[int]:
    """Return the training images that stay when copies are removed."""
    count, removed = len(train), set()
    for group in groups:
        own = [node for node in group if node < count]
        if len(own) == len(group):
            pixels = train.sizes[torch.tensor(own)].prod(dim=1)
            own.pop(int(pixels.argmax()))
        removed |= set(own)
    return [row for row in range(count) if row not in removed]


def write_groups(found: Duplicates, path: Path) -> None:
    """Write one row per image of a group as CSV."""
    text = io.StringIO()
    names = ("group", "set", "path", "width", "height", "similarity", "kept")
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows({**row, "path": ascii_safe(row["path"])} for row in found.rows())
    write_atomic(path, text.getvalue())


def ascii_safe(name: str) -> str:
    """Return a file name without bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_page(found: Duplicates, path: Path, title: str) -> None:
    """Write the groups as an HTML page with thumbnails, those with a test image first."""
    counts, best, stays = found.summary(), found.best(), set(found.kept)
    order = sorted(range(len(found.groups)), key=lambda k: (found.groups[k][-1] < len(found.train), k))
    remarks = [
        f"{counts['pairs']} pairs within {counts['train']} training images, {counts['leaks']} between these and "
        f"{counts['test']} test images; {counts['groups']} groups; {counts['removed']} training images are removed "
        f"(outlined). Threshold {found.threshold:g}."
    ]
    if len(order) > PAGE_GROUPS:
        remarks.append(f"The first {PAGE_GROUPS} groups; the CSV file has all.")
    sections = []
    for number in order[:PAGE_GROUPS]:
        group, figures = found.groups[number], []
        for node in group[:PAGE_FIGURES]:
            name, images, row = found.place(node)
            width, height = images.sizes[row].tolist()
            removed = name == TRAIN and node not in stays
            lines = [
                images.paths[row],
                f"{name}, {width} x {height}, {best[node]:.4f}",
                "removed" if removed else "kept",
            ]
            figures.append(Figure(images.picture(row), lines, marked=removed))
        leak = " with test images" if group[-1] >= len(found.train) else ""
        sections.append((f"Group {number + 1}: {len(group)} images{leak}", figures))
    write_atomic(path, page(title, remarks, sections))


def check_list(root: Path | None, path: Path) -> None:
    """Raise UserError where the images to keep cannot be written as a list, before anything is computed."""
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise UserError(f"--keep {path}: give a file that ends in {', '.join(LIST_SUFFIXES)}")
    if root is None:
        raise UserError("--keep: these images are no files, so no list can name them; leave --keep out")


def write_list(found: Duplicates, path: Path) -> None:
    """Write the training images that stay as a list that data.name=list reads, with labels where there are any.

    Raises UserError for a file name that a list cannot hold.
    """
    train, classes = found.train, found.train.classes
    names = [str(train.root.resolve() / train.paths[row]) for row in found.kept]
    labels = None
    if train.labels is not None:
        numbers = train.labels[torch.tensor(found.kept, dtype=torch.int64)].tolist()
        labels = [str(number) if classes is None else str(classes[number]) for number in numbers]
    plain = path.suffix.lower() in PLAIN
    for text in (*names, *(labels or ())):
        if text != text.strip() or not text.isprintable() or (plain and text.startswith("#")):
            raise UserError(f"--keep: a list cannot hold the name {text!r}; rename it")
    if plain:
        lines = names if labels is None else [f"{name}\t{label}" for name, label in zip(names, labels)]
        write_atomic(path, "\n".join(lines) + "\n")
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path"] if labels is None else ["path", "label"])
    table.writerows([name] for name in names) if labels is None else table.writerows(zip(names, labels))
    write_atomic(path, text.getvalue())

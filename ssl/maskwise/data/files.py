"""`Files`: image files with or without labels, however they were found; folders and lists are ways to find them."""

import difflib
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from maskwise.data import bands
from maskwise.data.decode import MAX_PIXELS
from maskwise.data.names import Names
from maskwise.functional.errors import UserError


class Files:
    """Image files below a root, in a fixed order.

    root: what the names are relative to; files: their names; labels: int64 array or None; class_names: of those
    labels; classes: keep only these (names, or a text file with one a line), renumbered in the set's order; per_class:
    keep the first n of each; channels and bits (8 or 16) of the images, and the most pixels one may have, see `bands.decode`.
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError for classes that are not there and for
    `classes` or `per_class` without labels.
    """

    def __init__(self, root: Path, files, labels, class_names, *, classes=None, per_class: int | None = None,
                 channels: int = 3, bits: int = 8, max_pixels: int = MAX_PIXELS):
        check(per_class, bits)
        if labels is None:
            for key, given in (("classes", classes), ("per_class", per_class)):
                if given is not None:
                    raise UserError(f"data.{key} needs one subfolder per class, and {root} has none; leave it out, or give a list with labels")
        else:
            labels = np.asarray(labels, dtype=np.int64)
            rows, labels, class_names = narrowed(labels, class_names, classes, per_class)
            if rows is not None:
                files = Names.of(files[i] for i in rows.tolist())
        self.root, self.files, self.classes = root, files, class_names
        self.channels, self.bits, self.max_pixels = channels, bits, max_pixels
        self.labels = None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> torch.Tensor:
        """One image, uint8 (uint16 where bits is 16) [channels, H, W]. Raises decode.CorruptImage."""
        return bands.decode(self._file(index), self.files[index], self.channels, self.bits, max_pixels=self.max_pixels)

    @property
    def source(self):
        """Of RGB images of eight bits: index -> the file, which the loader decodes as it likes best."""
        if (self.channels, self.bits) != (3, 8):
            raise AttributeError("only files of three channels of eight bits are decoded elsewhere")
        return self._file

    def _file(self, index: int) -> Path:
        return self.root / self.files[index]

    def name(self, index: int) -> str:
        """Path of one image relative to the root, with forward slashes."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Hex digest of the names and sizes in bytes of all files: changes when the set changes."""
        return names_and_sizes(self.root, self.files)

    def stamp(self) -> str:
        """Hex digest of place, names, sizes and dates of all files: changes, too, when a file is written anew at the same size."""
        digest = hashlib.sha256(str(self.root.resolve()).encode("utf-8", "surrogateescape"))
        for file in self.files:
            digest.update(f"{file}\0{size_and_date(self.root / file)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def names_and_sizes(root: Path, files) -> str:
    """Hex digest of the names of files below a root and of their sizes in bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{size_and_date(root / file)[0]}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def size_and_date(path: Path) -> tuple[int, int]:
    """Bytes and nanoseconds of a file's last change; (-1, 0) of one that is not there any more, which is for its reader to tell."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def check(per_class: int | None, bits: int) -> None:
    """Raises UserError for numbers that cannot be, before any file is looked for."""
    if per_class is not None and per_class < 1:
        raise UserError(f"data.per_class is {per_class}; it must be at least 1")
    if bits not in (8, 16):
        raise UserError(f"data.bits is {bits}; images have 8 or 16 bits a channel")


def narrowed(labels: np.ndarray, names: list[str], classes, per_class: int | None):
    """Rows int64 to keep (None: all), their labels and class names after a choice of classes and of the first of each."""
    rows = None
    if classes is not None:
        wanted = wanted_classes(classes, names)
        renumbered = np.full(len(names), -1, dtype=np.int64)
        renumbered[wanted] = np.arange(len(wanted))
        kept = renumbered[labels]
        rows = np.flatnonzero(kept >= 0)
        labels, names = kept[rows], [names[k] for k in wanted]
    if per_class is not None:
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels, minlength=len(names))
        place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.sort(order[place < per_class])
        rows, labels = (first if rows is None else rows[first]), labels[first]
    return rows, labels, names


def wanted_classes(classes, names: list[str]) -> list[int]:
    """Indices of the classes asked for, in the set's order. Raises UserError for a name it lacks or says twice, or a list it cannot read."""
    if isinstance(classes, str):
        if not Path(classes).expanduser().is_file():
            raise UserError(f"data.classes: there is no file {classes}; give a list of class names, or a text file with one a line")
        try:
            lines = Path(classes).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.classes: cannot read {classes} ({type(error).__name__}); give a text file with one class a line") from None
        classes = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if not len(classes):
        raise UserError("data.classes is empty; name the classes to keep, or leave it out")
    index = {name: k for k, name in enumerate(names)}
    for name, count in Counter(map(str, classes)).items():
        if name not in index:
            near = difflib.get_close_matches(name, names, 1)
            raise UserError(f"data.classes: no class {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {shortened(names)}"))
        if count > 1:
            raise UserError(f"data.classes: {name!r} stands {count} times; name it once")
    return sorted(index[str(name)] for name in classes)


def numbered(values: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels as written -> int64 labels and class names: whole numbers in numeric order, anything else alphabetically."""
    kinds = sorted(set(values))
    if all(kind.lstrip("-").isdigit() for kind in kinds):
        kinds.sort(key=int)
    index = {kind: k for k, kind in enumerate(kinds)}
    return np.fromiter((index[value] for value in values), dtype=np.int64, count=len(values)), kinds


def shortened(names: list[str], limit: int = 6) -> str:
    """Names joined by commas, at most `limit` of them."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest

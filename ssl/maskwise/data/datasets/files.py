"""Image files with or without labels: the common base of folders and lists."""

import difflib
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from maskwise.data.datasets.contents import bytes_digest, names_digest, sizes_digest
from maskwise.data.datasets.packed_strings import PackedStrings
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import MAX_PIXELS
from maskwise.data.decoding.multichannel import ValueRange
from maskwise.errors import UserError
from maskwise.storage.address import local, was_remote


class ImageFiles:
    """Image files under a root folder, in a fixed order.

    files: names relative to root; labels: int64 array or None; class_names: of those labels; classes: keep only these
    (names, or a text file with one per line), renumbered in the set's order; per_class: keep the first n of each;
    channels, bits (8 or 16), max_pixels and value_range: see `multichannel.decode`.
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError for unknown classes and for `classes` or
    `per_class` without labels.
    """

    def __init__(
        self,
        root: Path,
        files,
        labels,
        class_names,
        *,
        classes=None,
        per_class: int | None = None,
        channels: int = 3,
        bits: int = 8,
        max_pixels: int = MAX_PIXELS,
        value_range: ValueRange | None = None,
    ):
        check_options(per_class, bits, value_range)
        if labels is None:
            for key, value in (("classes", classes), ("per_class", per_class)):
                if value is not None:
                    raise UserError(
                        f"data.{key} needs labels, and the images in {root} have none; "
                        "leave it out, or give one subfolder per class or a list with labels"
                    )
        else:
            labels = np.asarray(labels, dtype=np.int64)
            rows, labels, class_names = filter_classes(labels, class_names, classes, per_class)
            if rows is not None:
                files = PackedStrings.of(files[i] for i in rows.tolist())
        self.root, self.files, self.classes = root, files, class_names
        self.channels, self.bits, self.max_pixels, self.value_range = channels, bits, max_pixels, value_range
        self.labels = None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> torch.Tensor:
        """Decode one image to uint8 (uint16 where bits is 16) [channels, H, W]. Raises CorruptImage."""
        return multichannel.decode(
            self.source(index),
            self.files[index],
            self.channels,
            self.bits,
            max_pixels=self.max_pixels,
            value_range=self.value_range,
        )

    def stored_range(self, index: int) -> tuple[str, float, float] | None:
        """Return kind and range of the stored values of one image, None for 8-bit values."""
        return multichannel.stored_range(self.source(index))

    def source(self, index: int) -> Path:
        """Return the path of one image, for a decoder of the loader's choice."""
        return self.root / self.files[index]

    def name(self, index: int) -> str:
        """Return the path of one image relative to the root, with forward slashes."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Return a hex digest of the names and sizes in bytes of all files."""
        return names_and_sizes(self.root, self.files)

    def contents(self) -> dict[str, str]:
        """Return digests of all names, of the sizes of some files and of the beginning of a few."""
        return {
            "names": names_digest(self.files),
            "sizes": sizes_digest(self.root, self.files),
            "bytes": bytes_digest(self.root, self.files),
        }

    def stamp(self) -> str:
        """Return a hex digest of root, names, sizes and modification times; it changes even if the sizes do not."""
        digest = hashlib.sha256(str(self.root.resolve()).encode("utf-8", "surrogateescape"))
        for file in self.files:
            digest.update(f"{file}\0{size_and_date(self.root / file)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def local_path(path: str | Path) -> Path:
    """Return a path as the system spells it: under LC_ALL=C, text of a file stands for its UTF-8 bytes.

    Raises UserError for an address in object storage, which datasets of local files cannot read.
    """
    if was_remote(path):
        raise UserError(
            f"{path} is in object storage, which is read as tar files or Parquet: pack the images into tar files "
            "(data.name=tar), or give a local path"
        )
    path = local(str(path))
    return Path(os.fsdecode(str(path).encode("utf-8", "surrogateescape"))).expanduser()


def names_and_sizes(root: Path, files) -> str:
    """Return a hex digest of the names and sizes in bytes of files under a root."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{size_and_date(root / file)[0]}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def size_and_date(path: Path) -> tuple[int, int]:
    """Return size in bytes and modification time in ns; (-1, 0) for a missing file, reported on reading."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return -1, 0
    return status.st_size, status.st_mtime_ns


def check_options(per_class: int | None, bits: int, value_range: ValueRange | None = None) -> None:
    """Raise UserError for values out of range, before any file is searched."""
    if per_class is not None and per_class < 1:
        raise UserError(f"data.per_class is {per_class}; it must be at least 1")
    if bits not in (8, 16):
        raise UserError(f"data.bits is {bits}; images have 8 or 16 bits per channel")
    if value_range is not None and not value_range[0] < value_range[1]:
        raise UserError(
            f"data.value_range is {list(value_range)}; give the values that become black and white, the lower one first"
        )


def filter_classes(labels: np.ndarray, names: list[str], classes, per_class: int | None):
    """Select classes and the first n of each -> rows int64 to keep (None: all), their labels and the class names."""
    rows = None
    if classes is not None:
        wanted = wanted_classes(classes, names)
        renumbered = np.full(len(names), -1, dtype=np.int64)
        renumbered[wanted] = np.arange(len(wanted))
        new_labels = renumbered[labels]
        rows = np.flatnonzero(new_labels >= 0)
        labels, names = new_labels[rows], [names[k] for k in wanted]
    if per_class is not None:
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels, minlength=len(names))
        place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.sort(order[place < per_class])
        rows, labels = (first if rows is None else rows[first]), labels[first]
    return rows, labels, names


def wanted_classes(classes, names: list[str]) -> list[int]:
    """Return the indices of the requested classes, in the set's order.

    Raises UserError for unknown or repeated names and for an unreadable list.
    """
    if isinstance(classes, str):
        if not local_path(classes).is_file():
            raise UserError(
                f"data.classes: there is no file {classes}; "
                "give a list of class names, or a text file with one per line"
            )
        try:
            lines = text_lines(local_path(classes).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"data.classes: cannot read {classes} ({type(error).__name__}); "
                "give a text file with one class per line"
            ) from None
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        classes = [line if line in names else line.split()[0] for line in lines]
    if len(classes) == 0:
        raise UserError("data.classes is empty; name the classes to keep, or leave it out")
    index = {name: k for k, name in enumerate(names)}
    for name, count in Counter(map(str, classes)).items():
        if name not in index:
            near = difflib.get_close_matches(name, names, 1)
            raise UserError(
                f"data.classes: no class {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; there are {join_names(names)}")
            )
        if count > 1:
            raise UserError(f"data.classes: {name!r} is listed {count} times; list it once")
    return sorted(index[str(name)] for name in classes)


def text_lines(text: str) -> list[str]:
    """Split a text at line ends alone: a name may contain other characters at which `splitlines` splits."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def join_names(names: list[str], limit: int = 6) -> str:
    """Join at most `limit` names by commas."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest

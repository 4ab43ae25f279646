"""Images listed in a dataset's own annotation files, and checks for missing files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.datasets.files import join_names, names_and_sizes
from maskwise.data.decoding.image import decode
from maskwise.errors import UserError


class ListedFiles:
    """Images by name relative to a folder, in the given order.

    dataset: name for messages; labels: int64 [n] or None; classes: their names or None. Raises UserError where files
    are missing, naming the first.
    """

    upright = True

    def __init__(
        self,
        dataset: str,
        root: Path,
        files: Sequence[str],
        labels: Sequence[int] | Tensor | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.root, self.files = Path(root), list(files)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self.classes = None if classes is None else list(classes)
        if not self.files:
            raise UserError(f"{dataset}: no images are listed for {root}; give the whole dataset")
        missing = [file for file in self.files if not (self.root / file).is_file()]
        if missing:
            raise UserError(
                f"{dataset}: {len(missing)} of {len(self.files)} images are missing, first {self.root / missing[0]}; "
                "unpack the whole dataset"
            )

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """Decode one image to uint8 [3, H, W]. Raises CorruptImage."""
        return decode(self.root / self.files[index], self.files[index], upright=self.upright)

    def name(self, index: int) -> str:
        """Return the path of one image relative to its folder."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Return a hex digest of the names and sizes in bytes of all files."""
        return names_and_sizes(self.root, self.files)


class UnrotatedFiles(ListedFiles):
    """Images read without applying EXIF orientation: published boxes and masks refer to the stored pixels."""

    upright = False


class BoxedFiles(UnrotatedFiles):
    """Images with boxes: `.boxes(i)`, float [n, 4] as x0, y0, x1, y1 in pixels.

    inclusive: the maxima are pixels of the object, not the first ones behind it.
    """

    inclusive = False

    def __init__(self, *listed, boxes: Sequence[Tensor]):
        super().__init__(*listed)
        self._boxes = boxes

    def boxes(self, index: int) -> Tensor:
        """Return the boxes of one image, float [n, 4]."""
        return self._boxes[index]


def find_root(folder, *names: str) -> Path:
    """Return the first of these subfolders that exists, or the folder itself: users may give either."""
    folder = Path(folder).expanduser()
    return next((folder / name for name in names if (folder / name).exists()), folder)


def require_files(dataset: str, root: Path, *entries: str) -> Path:
    """Return the root of a dataset. Raises UserError for a missing folder or missing entries, naming them."""
    if not root.is_dir():
        raise UserError(f"{dataset}: {root} is not a folder; give the folder of the dataset")
    missing = [entry for entry in entries if not (root / entry).exists()]
    if missing:
        raise UserError(f"{dataset}: {root} lacks {join_names(missing)}; it should have {join_names(list(entries), 9)}")
    return root


def read_table(dataset: str, path: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """Read a text table of `columns` words per line, the last taking the rest. Raises UserError for short lines."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()[skip:]
    except OSError as error:
        raise UserError(f"{dataset}: cannot read {path}: {error.strerror}; unpack the dataset again") from None
    table = [line.split(maxsplit=columns - 1) for line in lines if line.strip()]
    short = next((number for number, words in enumerate(table) if len(words) < columns), None)
    if short is not None:
        raise UserError(
            f"{dataset}: {path}, line {short + skip + 1}: {len(table[short])} columns, not {columns}; "
            "unpack the dataset again"
        )
    return [[word.strip() for word in words] for words in table]


def parse_int(dataset: str, path: Path, word: str) -> int:
    """Parse a whole number of a text table. Raises UserError for anything else."""
    try:
        return int(word)
    except ValueError:
        raise UserError(f"{dataset}: {path}: {word!r} is not a number; unpack the dataset again") from None

"""Images listed by a dataset's own files, and the one line for what is missing of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.datasets import shortened
from maskwise.data.decode import decode
from maskwise.data.files import names_and_sizes
from maskwise.functional.errors import UserError


class Files:
    """Images by relative name under a folder, in the order given.

    labels: int64 [n] or None; classes: their names or None. Raises UserError, naming the first, where files are missing.
    """

    upright = True

    def __init__(self, what: str, root: Path, files: Sequence[str], labels: Sequence[int] | Tensor | None = None, classes: Sequence[str] | None = None):
        self.root, self.files = Path(root), list(files)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self.classes = None if classes is None else list(classes)
        if not self.files:
            raise UserError(f"{what}: no images are listed for {root}; give the whole dataset")
        gone = [file for file in self.files if not (self.root / file).is_file()]
        if gone:
            raise UserError(f"{what}: {len(gone)} of {len(self.files)} images are missing, first {self.root / gone[0]}; unpack the whole dataset")

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """uint8 [3, H, W] of one image. Raises decode.CorruptImage."""
        return decode(self.root / self.files[index], self.files[index], upright=self.upright)

    def name(self, index: int) -> str:
        """Path of one image relative to its folder."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Hex digest of the names and sizes in bytes of all files."""
        return names_and_sizes(self.root, self.files)


class Stored(Files):
    """Images that stay as they are stored, whatever their EXIF says: published boxes and masks are of those pixels."""

    upright = False


class Boxed(Stored):
    """Images with boxes: `.boxes(i)`, float [n, 4] as x0, y0, x1, y1 in pixels."""

    def __init__(self, *listed, boxes: Sequence[Tensor]):
        super().__init__(*listed)
        self.table = boxes

    def boxes(self, index: int) -> Tensor:
        """float [n, 4] of one image."""
        return self.table[index]


def below(folder, *names: str) -> Path:
    """The folder itself, or the first of these subfolders that it has: users point at either."""
    folder = Path(folder).expanduser()
    return next((folder / name for name in names if (folder / name).exists()), folder)


def need(what: str, root: Path, *entries: str) -> Path:
    """The root of a dataset that has all these files and folders; raises UserError with one line for those it lacks."""
    if not root.is_dir():
        raise UserError(f"{what}: {root} is not a folder; give the folder of the dataset")
    lacking = [entry for entry in entries if not (root / entry).exists()]
    if lacking:
        raise UserError(f"{what}: {root} lacks {shortened(lacking)}; it should hold {shortened(list(entries), 9)}")
    return root


def rows(what: str, path: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """Lines of a text table as at least `columns` words, the last word taking the rest; raises UserError for a line that is shorter."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()[skip:]
    except OSError as error:
        raise UserError(f"{what}: cannot read {path}: {error.strerror}; unpack the dataset again") from None
    table = [line.split(maxsplit=columns - 1) for line in lines if line.strip()]
    short = next((number for number, words in enumerate(table) if len(words) < columns), None)
    if short is not None:
        raise UserError(f"{what}: {path}, line {short + skip + 1}: {len(table[short])} columns, not {columns}; unpack the dataset again")
    return [[word.strip() for word in words] for words in table]


def number(what: str, path: Path, word: str) -> int:
    """A whole number of a text table; raises UserError where it is none."""
    try:
        return int(word)
    except ValueError:
        raise UserError(f"{what}: {path}: {word!r} is not a number; unpack the dataset again") from None

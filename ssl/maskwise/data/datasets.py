"""Sets of images: how many there are, the pixels of one, and labels where they are known."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import torch

from maskwise.data.decode import decode
from maskwise.data.shapes import Shapes
from maskwise.functional.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


class Folder:
    """Images of a folder on disk, in sorted order.

    Where the folder itself holds no image and each of its subfolders with images holds some directly, the
    subfolders are classes and everything below one belongs to it. Otherwise all images at any depth form one set
    without labels. Names that begin with a dot are passed over.

    path: the folder; split: a subfolder of it (`train`, `val`); per_class: keep the first n files of each class
    in sorted order (attmask.md fact 55).
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError for a missing path, for a folder
    without images and for per_class without classes.
    """

    def __init__(self, path, split: str | None = None, per_class: int | None = None):
        root = existing_folder(Path(path).expanduser(), split)
        if per_class is not None and per_class < 1:
            raise UserError(f"data.per_class is {per_class}; it must be at least 1")
        self.root = root
        files, others = scan(root)
        if not files:
            raise UserError(nothing_found(root, others))
        self.classes = class_names(files)
        labels = None
        if self.classes is not None:
            index = {name: k for k, name in enumerate(self.classes)}
            labels = [index[file.partition("/")[0]] for file in files]
        if per_class is not None:
            if labels is None:
                raise UserError(f"data.per_class needs one subfolder per class, and {root} has none; leave it out")
            files, labels = first_of_each(files, labels, per_class)
        self.files = files
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W] of one image. Raises decode.CorruptImage."""
        return decode(self.source(index), self.files[index])

    def source(self, index: int) -> Path:
        """The file of one image."""
        return self.root / self.files[index]

    def name(self, index: int) -> str:
        """Path of one image relative to the folder, with forward slashes."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Hex digest of the names and sizes in bytes of all files: changes when the set changes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file}\0{os.stat(self.root / file).st_size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def stamp(self) -> str:
        """Hex digest of place, names, sizes and dates of all files: changes, too, when a file is written anew at the same size."""
        digest = hashlib.sha256(str(self.root.resolve()).encode("utf-8", "surrogateescape"))
        for file in self.files:
            found = os.stat(self.root / file)
            digest.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def existing_folder(path: Path, split: str | None) -> Path:
    """The folder to read. Raises UserError where it does not exist."""
    if not path.exists():
        raise UserError(f"data.path: {path} does not exist; give the folder that holds the images")
    if not path.is_dir():
        raise UserError(f"data.path: {path} is a file; give the folder that holds the images")
    if split is None:
        return path
    if not (path / split).is_dir():
        held = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        raise UserError(f"data.split: no folder {split!r} in {path}; it holds {shortened(held) or 'no folders'}")
    return path / split


def scan(root: Path) -> tuple[list[str], Counter]:
    """Image files below a folder, relative and sorted, and how many other files of each extension there are."""
    files, others = [], Counter()

    def refuse(error):
        raise UserError(f"data.path: cannot read {error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            if name.startswith("."):
                continue
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS:
                files.append(name if prefix == "." else f"{prefix}/{name}")
            else:
                others[extension or "no extension"] += 1
    return sorted(files), others


def class_names(files: list[str]) -> list[str] | None:
    """Top folders of relative files if each can be a class, else None."""
    tops = {file.partition("/")[0] for file in files if "/" in file}
    direct = {file.partition("/")[0] for file in files if file.count("/") == 1}
    if any("/" not in file for file in files) or tops != direct:
        return None
    return sorted(tops)


def first_of_each(files: list[str], labels: list[int], count: int) -> tuple[list[str], list[int]]:
    """The first `count` files of each label, order kept."""
    taken: Counter = Counter()
    kept = []
    for pair in zip(files, labels):
        taken[pair[1]] += 1
        if taken[pair[1]] <= count:
            kept.append(pair)
    return [file for file, _ in kept], [label for _, label in kept]


def nothing_found(root: Path, others: Counter) -> str:
    """The line for a folder without images."""
    accepted = " ".join(extension[1:] for extension in EXTENSIONS)
    if not others:
        return f"data.path: {root} is empty; put images in it ({accepted})"
    found = shortened([f"{count} {extension}" for extension, count in others.most_common()])
    return f"data.path: {root} holds no images, only other files ({found}); images are {accepted}"


def shortened(names: list[str], limit: int = 6) -> str:
    """Names joined by commas, at most `limit` of them."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


DATASETS = {"folder": Folder, "shapes": Shapes}

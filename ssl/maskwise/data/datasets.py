"""Sets of images: how many there are, the pixels of one, and labels where they are known; the table of their kinds."""

from collections import Counter
from pathlib import Path

import numpy as np

from maskwise.data import bands
from maskwise.data.decode import MAX_PIXELS
from maskwise.data.files import Files, check, shortened
from maskwise.data.huggingface import HuggingFace
from maskwise.data.index import EXTENSIONS, scan
from maskwise.data.listed import Listed
from maskwise.data.shapes import Shapes
from maskwise.data.shards import Tar
from maskwise.data.torchvision_sets import TorchvisionSet
from maskwise.functional.errors import UserError


class Folder(Files):
    """Images of a folder on disk, in sorted order.

    Where the folder itself holds no image and each of its subfolders with images holds some directly, the
    subfolders are classes and everything below one belongs to it. Otherwise all images at any depth form one set
    without labels. Names that begin with a dot are passed over; `.npy` arrays are images where `channels` is not 3
    or `bits` is 16.

    path: the folder; split: a subfolder of it (`train`, `val`); classes: keep these (names, or a text file with one
    a line); per_class: keep the first n files of each class in sorted order (attmask.md fact 55); max_pixels: an image of more
    is unreadable.
    Raises UserError for a missing path, for a folder without images and for classes or per_class without classes.
    """

    def __init__(self, path, split: str | None = None, classes=None, per_class: int | None = None, channels: int = 3, bits: int = 8,
                 max_pixels: int = MAX_PIXELS):
        check(per_class, bits)
        root = existing_folder(Path(path).expanduser(), split)
        extensions = EXTENSIONS + bands.ARRAYS if (channels, bits) != (3, 8) else EXTENSIONS
        files, others = scan(root, extensions)
        if not files:
            raise UserError(nothing_found(root, others, extensions))
        names, labels = by_subfolder(files)
        super().__init__(root, files, labels, names, classes=classes, per_class=per_class, channels=channels, bits=bits, max_pixels=max_pixels)


def existing_folder(path: Path, split: str | None) -> Path:
    """The folder to read. Raises UserError where it does not exist."""
    if not path.exists():
        raise UserError(f"data.path: {path} does not exist; give the folder that holds the images")
    if not path.is_dir():
        raise UserError(f"data.path: {path} is a file; give the folder that holds the images, or data.name=list for a list of them")
    if split is None:
        return path
    if not (path / split).is_dir():
        held = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        raise UserError(f"data.split: no folder {split!r} in {path}; it holds {shortened(held) or 'no folders'}")
    return path / split


def by_subfolder(files) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and labels int64 of sorted relative files whose top folders can be classes; (None, None) if they cannot."""
    names: dict[str, int] = {}
    direct: set[str] = set()
    labels = np.empty(len(files), dtype=np.int64)
    for row, file in enumerate(files):
        top, slash, rest = file.partition("/")
        if not slash:
            return None, None
        labels[row] = names.setdefault(top, len(names))
        if top not in direct and "/" not in rest:
            direct.add(top)
    if len(direct) != len(names):
        return None, None
    # files are sorted as whole paths, where "a b/x" comes before "a/x": the order of first sight is not that of the names
    ordered = sorted(names)
    place = np.empty(len(names), dtype=np.int64)
    for k, name in enumerate(ordered):
        place[names[name]] = k
    return ordered, place[labels]


def nothing_found(root: Path, others: Counter, extensions=EXTENSIONS) -> str:
    """The line for a folder without images."""
    accepted = " ".join(extension[1:] for extension in extensions)
    if not others:
        return f"data.path: {root} is empty; put images in it ({accepted})"
    found = shortened([f"{count} {extension}" for extension, count in others.most_common()])
    return f"data.path: {root} holds no images, only other files ({found}); images are {accepted}"


DATASETS = {"folder": Folder, "list": Listed, "tar": Tar, "torchvision": TorchvisionSet, "huggingface": HuggingFace, "shapes": Shapes}

"""Image folders, with one subfolder per class or without labels."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maskwise.bounds import Count
from maskwise.data.datasets.files import ImageFiles, check_options, join_names, local_path
from maskwise.data.datasets.folder_index import scan
from maskwise.data.datasets.left_out import image_endings, left_out, remedies_of
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import MAX_PIXELS, PixelLimit
from maskwise.data.decoding.multichannel import ValueRange
from maskwise.errors import UserError
from maskwise.imaging.formats import common_endings

TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("val", "test", "valid", "validation")  # of subfolders, in any case

FEW = 3  # images beside class folders that are probably there by mistake


class Folder(ImageFiles):
    """Images of a folder on disk, in sorted order.

    Subfolders are classes where the folder itself has no images and every subfolder with images has some directly;
    deeper images belong to the class above them. Otherwise all images at any depth form one set without labels. Names
    that begin with a dot are skipped; `.npy` arrays are images where `channels` is not 3 or `bits` is 16.

    path: the folder; split: a subfolder of it (`train`, `val`); classes: keep these (names, or a text file with one per
    line); per_class: keep the first n files of each class in sorted order (AttMask, 20 % of ImageNet: 260 per class);
    max_pixels: larger images count as unreadable; value_range: the stored values that become black and white.
    Raises UserError for a missing path, for a folder without images and for classes or per_class without classes.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        classes: str | Sequence[str] | None = None,
        per_class: Count | None = None,
        channels: int = 3,
        bits: int = 8,
        max_pixels: PixelLimit = MAX_PIXELS,
        value_range: ValueRange | None = None,
    ):
        check_options(per_class, bits, value_range)
        root = existing_folder(local_path(path), split)
        extensions = image_endings(channels, bits)
        files, others = scan(root, extensions)
        if not files:
            raise UserError(no_images_message(root, others, extensions))
        names, labels = by_subfolder(files)
        super().__init__(
            root,
            files,
            labels,
            names,
            classes=classes,
            per_class=per_class,
            channels=channels,
            bits=bits,
            max_pixels=max_pixels,
            value_range=value_range,
        )
        self.notes = left_out(root, len(files), others)
        if labels is None and 0 < len(list(itertools.islice(loose_files(files), FEW + 1))) <= FEW < len(files):
            self.notes.append(why_no_classes(root, files))

    @property
    def no_labels(self) -> str | None:
        """Return why the images have no labels, None where they have some."""
        return why_no_classes(self.root, self.files) if self.labels is None else None


def loose_files(files) -> Iterator[str]:
    """Iterate over the files that lie in no subfolder."""
    return (name for name in files if "/" not in name)


def existing_folder(path: Path, split: str | None) -> Path:
    """Return the folder of a split. Raises UserError where it does not exist."""
    if not path.exists():
        raise UserError(f"data.path: {path} does not exist; give the folder that holds the images")
    if not path.is_dir():
        raise UserError(
            f"data.path: {path} is a file; give the folder that holds the images, or data.name=list for a list of them"
        )
    if split is None:
        return path
    if not (path / split).is_dir():
        subfolders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        choice = f"it has {join_names(subfolders)}: set data.split to one of them, or " if subfolders else ""
        raise UserError(f"{path} has no subfolder {split}/; {choice}set data.split=null for all images in {path}")
    return path / split


def by_subfolder(files) -> tuple[list[str] | None, np.ndarray | None]:
    """Derive class names and labels int64 from the top folders of sorted files; (None, None) without classes."""
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
    # Files are sorted as whole paths, where "a b/x" precedes "a/x": classes may first appear out of name order.
    ordered = sorted(names)
    place = np.empty(len(names), dtype=np.int64)
    for k, name in enumerate(ordered):
        place[names[name]] = k
    # Class names are text, the same in every locale; those of folders are spelled as the system spells them.
    return [os.fsencode(name).decode("utf-8", "surrogateescape") for name in ordered], place[labels]


def why_no_classes(root: Path, files) -> str:
    """Describe why the sorted files of a folder are no classes, and the remedy."""
    loose = list(loose_files(files))
    if len(loose) == len(files):
        return f"{root} has images but no subfolders of them; give one subfolder per class"
    if loose:
        verb, move = ("lies", "it") if len(loose) == 1 else (f"and {len(loose) - 1} more lie", "them")
        return f"{root / loose[0]} {verb} beside the class folders, so they are not read as classes; move {move}"
    direct = {top for top, _, rest in (name.partition("/") for name in files) if "/" not in rest}
    deep = next(name for name in files if name.partition("/")[0] not in direct)
    return (
        f"{root / deep.partition('/')[0]} holds images in subfolders only ({deep}), so the folders of {root} are not "
        "read as classes; move its images up"
    )


def no_images_message(root: Path, others: Counter, extensions: tuple[str, ...]) -> str:
    """Describe a folder without images."""
    accepted = common_endings() + (" npy" if set(extensions) & set(multichannel.ARRAYS) else "")
    if not others:
        return f"data.path: {root} is empty; put images in it ({accepted})"
    present = join_names([f"{count} {extension}" for extension, count in others.most_common()])
    remedies = "".join(f"; {text}" for text in remedies_of(others))
    return f"data.path: {root} has no images, only other files ({present}){remedies}; images are {accepted}"

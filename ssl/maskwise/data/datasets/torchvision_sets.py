"""torchvision's datasets by name, from files on disk; nothing is downloaded."""

import contextlib
import difflib
import hashlib
import inspect
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from maskwise.bounds import Count
from maskwise.data.datasets.contents import OPENED, beginning, digest, names_digest, numbers_digest, sampled, size
from maskwise.data.datasets.files import check_options, filter_classes, local_path
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import MAX_PIXELS, PixelLimit
from maskwise.data.decoding.multichannel import ValueRange
from maskwise.errors import UserError

SETS = (
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "FashionMNIST",
    "KMNIST",
    "EMNIST",
    "QMNIST",
    "USPS",
    "SVHN",
    "STL10",
    "Caltech101",
    "Caltech256",
    "Country211",
    "DTD",
    "EuroSAT",
    "FER2013",
    "FGVCAircraft",
    "Flowers102",
    "Food101",
    "GTSRB",
    "Imagenette",
    "ImageNet",
    "INaturalist",
    "LFWPeople",
    "Omniglot",
    "OxfordIIITPet",
    "PCAM",
    "Places365",
    "RenderedSST2",
    "SEMEION",
    "StanfordCars",
    "SUN397",
)
LABELS = ("targets", "labels", "_labels", "y")
SAMPLES = ("_samples", "samples", "_image_files")
FILES = ("_samples", "samples", "_image_files", "_images", "data")  # paths, or pairs of path and label
CLASSES = ("classes", "categories", "class_to_idx", "wnids")


class TorchvisionSet:
    """A torchvision dataset, read from files under `path` in torchvision's layout.

    set: the dataset's name, in any case; split: `train`, `test`, `val` or the dataset's own split names (datasets with
    a `train` flag accept train and test); classes, per_class, channels, bits, max_pixels, value_range as
    `ImageFiles`.
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError for an unknown set or split and for missing
    files.
    """

    def __init__(
        self,
        path: str | Path,
        set: str,
        split: str | None = None,
        classes: str | Sequence[str] | None = None,
        per_class: Count | None = None,
        channels: int = 3,
        bits: int = 8,
        max_pixels: PixelLimit = MAX_PIXELS,
        value_range: ValueRange | None = None,
    ):
        self.set, self.split = canonical_name(set), split
        check_options(per_class, bits, value_range)
        self.channels, self.bits, self.max_pixels, self.value_range = channels, bits, max_pixels, value_range
        self.root = local_path(path)
        self.dataset = open_dataset(self.set, self.root, split)
        labels, names = labels_of(self.dataset), names_of(self.dataset)
        if labels is not None and names is None:
            names = [str(k) for k in range(int(labels.max()) + 1)]
        if labels is None and (classes is not None or per_class is not None):
            key = "classes" if classes is not None else "per_class"
            raise UserError(f"data.{key}: {self.set} {split or ''} has no labels here; leave it out")
        self.rows = None
        if labels is not None:
            self.rows, labels, names = filter_classes(labels, names, classes, per_class)
        self.labels = None if labels is None else torch.from_numpy(np.array(labels, dtype=np.int64))
        self.classes = names
        unlabeled = f"{self.set} {split or ''} has no labels here; choose another split"
        self.no_labels = unlabeled if labels is None else None

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def image(self, index: int) -> torch.Tensor:
        """Decode one image to uint8 (uint16 where bits is 16) [channels, H, W]. Raises CorruptImage."""
        try:
            picture = self.dataset[self.row(index)][0]
        except Exception as error:  # torchvision's readers raise many types
            raise multichannel.CorruptImage.because(self.name(index), error) from None
        return multichannel.from_picture(
            picture,
            self.name(index),
            self.channels,
            self.bits,
            max_pixels=self.max_pixels,
            value_range=self.value_range,
        )

    def stored_range(self, index: int) -> tuple[str, float, float] | None:
        """Return kind and range of the stored values of one image, None for 8-bit values."""
        return multichannel.stored_range(self.dataset[self.row(index)][0])

    def row(self, index: int) -> int:
        """Return the row of an image in torchvision's own order."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self.rows is None else int(self.rows[index])

    def name(self, index: int) -> str:
        """Return set, split and row of an image."""
        return f"{self.set}/{self.split or 'all'}/{self.row(index)}"

    def fingerprint(self) -> str:
        """Return a hex digest of set, split, rows and labels, and of the pixels where they are in memory."""
        digest = hashlib.sha256(f"{self.set} {self.split} {len(self)} {self.channels} {self.bits}".encode())
        pixels = getattr(self.dataset, "data", None)
        for part in (pixels, self.rows, self.labels):
            if part is not None and hasattr(part, "shape"):
                digest.update(np.ascontiguousarray(np.asarray(part)))
        return digest.hexdigest()

    def contents(self) -> dict[str, str]:
        """Return digests of rows and names, and of sizes and beginnings of files or of pixels, of some images each."""
        rows = [self.row(index) for index in sampled(len(self))]
        named = f"{self.set} {self.split}", *([] if self.rows is None else [self.rows.tobytes()])
        if (files := files_of(self.dataset)) is not None:
            names = names_digest(os.path.relpath(files[self.row(index)], self.root) for index in range(len(self)))
            sizes = numbers_digest(size(Path(files[row])) for row in rows)
            few = (beginning(Path(files[row])) for row in rows[:: max(1, len(rows) // OPENED)])
            return {"names": digest(*named, names), "sizes": sizes, "bytes": digest(*few)}
        pixels = getattr(self.dataset, "data", None)
        if pixels is None or len(pixels) != len(self.dataset):
            return {"names": digest(*named)}
        some = (np.ascontiguousarray(np.asarray(pixels[row])).tobytes() for row in rows)
        return {"names": digest(*named), "pixels": digest(*some)}


def files_of(dataset) -> list[str] | None:
    """Return the image files of a torchvision dataset, one for each image, None where it has no such list."""
    for name in FILES:
        entries = getattr(dataset, name, None)
        if entries is None or len(entries) != len(dataset):
            continue
        pairs = isinstance(entries[0], tuple)
        if isinstance(entries[0][0] if pairs else entries[0], (str, Path)):
            return [str(entry[0] if pairs else entry) for entry in entries]
    return None


def canonical_name(wanted: str) -> str:
    """Return a dataset's name in torchvision's spelling. Raises UserError for an unknown one."""
    known = {name.lower(): name for name in SETS}
    if str(wanted).lower() not in known:
        near = difflib.get_close_matches(str(wanted).lower(), known, 1)
        raise UserError(
            f"data.set: no set {wanted!r}"
            + (f"; did you mean {known[near[0]]}?" if near else f"; there are {', '.join(SETS)}")
        )
    return known[str(wanted).lower()]


def open_dataset(name: str, root: Path, split: str | None):
    """Open a torchvision dataset. Raises UserError where its files or the split are missing."""
    from maskwise.compat import ready_torchvision

    ready_torchvision()
    import torchvision.datasets

    make = getattr(torchvision.datasets, name, None)
    if make is None:
        raise UserError(f"data.set: this torchvision has no {name}; update torchvision, or choose another set")
    options = constructor_options(name, inspect.signature(make.__init__).parameters, split)
    try:
        with tensors_only():
            return make(str(root), **options)
    except pickle.UnpicklingError:
        raise UserError(
            f"data.path: {name} under {root} has a file of more than tensors, which would run code on loading; "
            "put torchvision's own files there"
        ) from None
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split()).replace("You can use download=True to download it", "").strip(" .")
        raise UserError(
            f"data.path: {name} is not under {root} ({text}); "
            "put torchvision's files of it there, nothing is downloaded"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"data.split: {name} with split={split!r}: {' '.join(str(error).split())}") from None
    except ImportError as error:
        raise UserError(
            f"data.set: {name} needs a package that is not installed ({error}); install it, or choose another set"
        ) from None


def constructor_options(name: str, accepted, split: str | None) -> dict:
    """Translate a split to the arguments a torchvision dataset accepts. Raises UserError for a split it lacks."""
    options = {}
    if "train" in accepted:
        if split not in (None, "train", "test", "val"):
            raise UserError(f"data.split: {name} has train and test, not {split!r}")
        options["train"] = split in (None, "train")
    elif "split" in accepted and split is not None:
        options["split"] = split
    elif split is not None:
        raise UserError(f"data.split: {name} comes in one part; leave data.split out")
    if name == "EMNIST":
        options = {"split": "balanced", "train": split in (None, "train")}
    if "download" in accepted:
        options["download"] = False
    return options


@contextlib.contextmanager
def tensors_only():
    """Restrict torch.load to tensors, also where an older torchvision requests more."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def labels_of(dataset) -> np.ndarray | None:
    """Return the int64 labels of a torchvision dataset, None where it has none or marks them with -1."""
    for name in LABELS:
        labels = getattr(dataset, name, None)
        if labels is not None and len(labels) == len(dataset):
            labels = np.asarray(labels)
            usable = labels.ndim == 1 and labels.dtype.kind in "iu" and labels.min() >= 0
            return labels.astype(np.int64) if usable else None
    for name in SAMPLES:
        samples = getattr(dataset, name, None)
        if samples is not None and len(samples) == len(dataset) and isinstance(samples[0], tuple):
            return np.array([int(sample[1]) for sample in samples], dtype=np.int64)
    return None


def names_of(dataset) -> list[str] | None:
    """Return the class names of a torchvision dataset, None where it has none."""
    for name in CLASSES:
        classes = getattr(dataset, name, None)
        if classes:
            return [entry[0] if isinstance(entry, tuple) else str(entry) for entry in classes]
    return None

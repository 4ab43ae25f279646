"""torchvision's named sets, from files that are already on disk; nothing is downloaded."""

import contextlib
import difflib
import hashlib
import inspect
import os
import pickle
from pathlib import Path

import numpy as np
import torch

from maskwise.data import bands
from maskwise.data.decode import MAX_PIXELS
from maskwise.data.files import narrowed
from maskwise.functional.errors import UserError

SETS = (
    "CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST", "USPS", "SVHN", "STL10", "Caltech101", "Caltech256", "Country211", "DTD",
    "EuroSAT", "FER2013", "FGVCAircraft", "Flowers102", "Food101", "GTSRB", "Imagenette", "ImageNet", "INaturalist", "LFWPeople", "Omniglot", "OxfordIIITPet",
    "PCAM", "Places365", "RenderedSST2", "SEMEION", "StanfordCars", "SUN397",
)  # fmt: skip
LABELS = ("targets", "labels", "_labels", "y")
SAMPLES = ("_samples", "samples", "_image_files")
CLASSES = ("classes", "categories", "class_to_idx", "wnids")


class TorchvisionSet:
    """A set of torchvision by name, read from the files under `path` as torchvision lays them out.

    path: its root; set: the name, in any case; split: `train`, `test`, `val` or what the set calls its parts (sets
    with a `train` switch take train and test); classes, per_class, channels, bits, max_pixels as `Files`.
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError for an unknown set or split and for files
    that are missing: torchvision is never asked to download.
    """

    def __init__(self, path, set: str, split: str | None = None, classes=None, per_class: int | None = None, channels: int = 3, bits: int = 8, max_pixels: int = MAX_PIXELS):
        self.set, self.split, self.channels, self.bits, self.max_pixels = named(set), split, channels, bits, max_pixels
        self.held = opened(self.set, Path(path).expanduser(), split)
        labels, names = labels_of(self.held), names_of(self.held)
        if labels is not None and names is None:
            names = [str(k) for k in range(int(labels.max()) + 1)]
        if labels is None and (classes is not None or per_class is not None):
            raise UserError(f"data.{'classes' if classes is not None else 'per_class'}: {self.set} {split or ''} has no labels here; leave it out")
        self.rows = None
        if labels is not None:
            self.rows, labels, names = narrowed(labels, names, classes, per_class)
        self.labels, self.classes = None if labels is None else torch.from_numpy(np.array(labels, dtype=np.int64)), names

    def __len__(self) -> int:
        return len(self.held) if self.rows is None else len(self.rows)

    def image(self, index: int) -> torch.Tensor:
        """One image, uint8 (uint16 where bits is 16) [channels, H, W]. Raises decode.CorruptImage."""
        try:
            picture = self.held[self.row(index)][0]
        except Exception as error:  # its own reading of files, of any sort
            raise bands.CorruptImage(self.name(index), " ".join(str(error).split())[:200] or type(error).__name__) from None
        return bands.from_picture(picture, self.name(index), self.channels, self.bits, max_pixels=self.max_pixels)

    def row(self, index: int) -> int:
        """Where image `index` stands in torchvision's own order."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self.rows is None else int(self.rows[index])

    def name(self, index: int) -> str:
        """Set, split and place of an image."""
        return f"{self.set}/{self.split or 'all'}/{self.row(index)}"

    def fingerprint(self) -> str:
        """Hex digest of set, split, rows and labels, and of the pixels where the set holds them in memory."""
        digest = hashlib.sha256(f"{self.set} {self.split} {len(self)} {self.channels} {self.bits}".encode())
        pixels = getattr(self.held, "data", None)
        for part in (pixels, self.rows, self.labels):
            if part is not None and hasattr(part, "shape"):
                digest.update(np.ascontiguousarray(np.asarray(part)))
        return digest.hexdigest()


def named(wanted: str) -> str:
    """A set's name in torchvision's spelling. Raises UserError for a set that is not there."""
    known = {name.lower(): name for name in SETS}
    if str(wanted).lower() not in known:
        near = difflib.get_close_matches(str(wanted).lower(), known, 1)
        raise UserError(f"data.set: no set {wanted!r}" + (f"; did you mean {known[near[0]]}?" if near else f"; there are {', '.join(SETS)}"))
    return known[str(wanted).lower()]


def opened(name: str, root: Path, split: str | None):
    """torchvision's dataset. Raises UserError where its files, or the split, are not there."""
    from maskwise.functional.torchvision_ready import ready_torchvision

    ready_torchvision()
    import torchvision.datasets

    make = getattr(torchvision.datasets, name, None)
    if make is None:
        raise UserError(f"data.set: this torchvision has no {name}; update torchvision, or choose another set")
    accepted = inspect.signature(make.__init__).parameters
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
    try:
        with tensors_only():
            return make(str(root), **options)
    except pickle.UnpicklingError:
        raise UserError(f"data.path: {name} under {root} holds a file of more than tensors, which would run code on loading; put torchvision's own files there") from None
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split()).replace("You can use download=True to download it", "").strip(" .")
        raise UserError(f"data.path: {name} is not under {root} ({text}); put torchvision's files of it there, nothing is downloaded") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"data.split: {name} with split={split!r}: {' '.join(str(error).split())}") from None
    except ImportError as error:
        raise UserError(f"data.set: {name} needs a package that is not installed ({error}); install it, or choose another set") from None


@contextlib.contextmanager
def tensors_only():
    """While entered, torch.load reads tensors only, also where an older torchvision asks for more."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def labels_of(held) -> np.ndarray | None:
    """int64 labels of a torchvision set, None where it has none (or marks them with -1)."""
    for name in LABELS:
        found = getattr(held, name, None)
        if found is not None and len(found) == len(held):
            labels = np.asarray(found)
            return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" and labels.min() >= 0 else None
    for name in SAMPLES:
        found = getattr(held, name, None)
        if found is not None and len(found) == len(held) and isinstance(found[0], tuple):
            return np.array([int(each[1]) for each in found], dtype=np.int64)
    return None


def names_of(held) -> list[str] | None:
    """Class names of a torchvision set, None where it tells none."""
    for name in CLASSES:
        found = getattr(held, name, None)
        if found:
            return [each[0] if isinstance(each, tuple) else str(each) for each in found]
    return None

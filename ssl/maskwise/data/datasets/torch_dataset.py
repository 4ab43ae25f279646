"""Images of a torch dataset, or of any object with `__len__` and `__getitem__`, given in Python."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from maskwise.data.datasets.contents import digest, sampled
from maskwise.data.datasets.labels import column_labels
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import CorruptImage
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.imaging.tensors import to_tensor, to_uint8

IMAGE_KEYS = ("image", "img", "pixel_values", "images")  # of items that are dicts
LABELS = ("targets", "labels")  # attributes that hold one label per item
FORMATS = "an item is an image, a tuple that begins with one, or a dict with the key `image`"
IMAGES = "an image is a PIL image, an array [H, W, C], a tensor [C, H, W], a path or the bytes of a file"
COMPARED, FINGERPRINTED = 16, 256  # images whose pixels identify a set
READING = threading.Lock()  # the threads of an evaluation take turns: a dataset need not allow several


class TorchDataset:
    """Images and labels of a map-style dataset, as uint8 [channels, H, W].

    Items: an image, (image, ...) or {"image": image, ...}; images: PIL, arrays, tensors (uint8, uint16, floats in
    0..1), paths or bytes of files. `.labels` int64 [n] come from the attribute `targets` or `labels`, else None;
    `.classes` from the attribute of that name. Random draws of the dataset from the generators of Python, NumPy and
    torch follow from the index alone, so that an image is the same in every epoch, start, rank and worker.
    Raises UserError for other objects, an empty dataset, and items of other formats.
    """

    def __init__(self, dataset=None, channels: int = 3):
        check_map_style(dataset)
        self.dataset, self.channels, self.bits = dataset, channels, 8
        labels, self.classes, reason = labels_of(dataset)
        self.labels = None if labels is None else torch.from_numpy(np.array(labels, dtype=np.int64))
        self.no_labels = reason
        self._check_items()

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, index: int):
        """Return the image of an item as the dataset gives it, a file decoded to uint8 [channels, H, W].

        Raises CorruptImage for an OSError, and UserError for another error of the dataset.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            image = self._read(index)
            if isinstance(image, Image.Image):
                image.load()  # of a file that is opened only, an error comes here
        except OSError as error:  # files, Pillow's UnidentifiedImageError included
            raise CorruptImage.because(self.name(index), error) from error
        except (UserError, CorruptImage):
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"dataset[{index}] raised {type(error).__name__}: {text}") from error
        if isinstance(image, (str, os.PathLike, bytes)):
            source = image if isinstance(image, bytes) else os.fspath(image)
            return multichannel.decode(source, self.name(index), self.channels, self.bits)
        return image

    def _read(self, index):
        if threading.current_thread() is not threading.main_thread():  # the generators are the main thread's
            with READING:
                return image_of(self.dataset[index])
        with keyed_random.seed_scope(keyed_random.make_key(keyed_random.DATASET, index)):
            return image_of(self.dataset[index])

    def image(self, index: int) -> Tensor:
        """Return one image as uint8 [channels, H, W]. Raises CorruptImage, and UserError for what is no image."""
        try:
            return to_uint8(to_tensor(self.item(index), self.channels))
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith("dataset[") else f"dataset[{index}]: {text}; {IMAGES}") from error

    def name(self, index: int) -> str:
        """Return the path of an item where the dataset lists paths, else its number."""
        files = self.dataset if isinstance(self.dataset, (list, tuple)) else getattr(self.dataset, "samples", None)
        if isinstance(files, (list, tuple)) and len(files) == len(self):
            path = files[index][0] if isinstance(files[index], (list, tuple)) and files[index] else files[index]
            if isinstance(path, (str, os.PathLike)):
                return os.fspath(path)
        return f"item {index}"

    def contents(self) -> dict[str, str]:
        """Return a digest of the pixels of a few images."""
        return {"pixels": self._pixels(COMPARED)}

    def fingerprint(self) -> str:
        """Return a hex digest of the dataset's class, its length and the pixels of at most 256 images."""
        kind = f"{type(self.dataset).__qualname__} {len(self)} {self.channels} {self._pixels(FINGERPRINTED)}"
        return hashlib.sha256(kind.encode()).hexdigest()

    def _pixels(self, count: int) -> str:
        parts: list[bytes | str] = []
        for index in sampled(len(self), count):
            try:
                image = self.image(index)
                parts += [str(list(image.shape)), image.contiguous().numpy().tobytes()]
            except CorruptImage:  # reported where the image is read
                parts.append("unreadable")
        return digest(*parts)

    def _check_items(self):
        for index in range(min(COMPARED, len(self))):
            try:
                self.image(index)
                return
            except CorruptImage as error:
                reason = error.reason
        raise UserError(f"none of the first {min(COMPARED, len(self))} items can be read (the last: {reason})")


class RawItems:
    """The images of a dataset as it gives them, for crops by an own transform; other datasets give tensors."""

    def __init__(self, dataset):
        self.dataset, self.labels = dataset, dataset.labels
        self.channels, self.bits = getattr(dataset, "channels", 3), getattr(dataset, "bits", 8)
        self.image = getattr(dataset, "item", dataset.image)

    def __len__(self) -> int:
        return len(self.dataset)


def check_map_style(dataset) -> None:
    """Raise UserError unless an object has a length and items by index."""
    if dataset is None:
        raise UserError(
            "data.name=python: the images are given in Python, by maskwise.train(recipe, out=..., dataset=...) and "
            "maskwise.evaluate(..., train=..., test=...)"
        )
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"{kind} is an IterableDataset, whose items have no order that a continued run could repeat; give a "
            "dataset with __len__ and __getitem__"
        )
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise UserError("this is a DataLoader; give its dataset, batches are made here")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, (str, Mapping)):
        raise UserError(f"{kind} is no dataset; give an object with __len__ and __getitem__")
    if not len(dataset):
        raise UserError(f"{kind} is empty; give a dataset with images")


def image_of(item):
    """Return the image of an item of a dataset. Raises UserError for an item of another format."""
    if isinstance(item, Mapping):
        key = next((key for key in IMAGE_KEYS if key in item), None)
        if key is None:
            keys = ", ".join(map(str, item))
            raise UserError(f"an item is a dict with the keys {keys}, and none of {', '.join(IMAGE_KEYS)}; {FORMATS}")
        return item[key]
    if isinstance(item, (tuple, list)):
        if not item:
            raise UserError(f"an item is an empty {type(item).__name__}; {FORMATS}")
        item = item[0]
    if not isinstance(item, (Image.Image, np.ndarray, Tensor, str, os.PathLike, bytes)):
        raise UserError(f"an item holds a {type(item).__name__} in place of an image; {FORMATS}; {IMAGES}")
    return item


def labels_of(dataset) -> tuple[np.ndarray | None, list[str] | None, str | None]:
    """Return labels int64, class names and None, or (None, None, the reason), by the attributes of a dataset."""
    values = label_values(dataset)
    kind = type(dataset).__name__
    if values is None:
        return None, None, f"{kind} has no attribute `targets` with a label per item; give it one"
    if len(values) != len(dataset):
        return None, None, f"the labels of {kind} are {len(values)} for {len(dataset)} items"
    names = next((names for part in parts_of(dataset) if (names := getattr(part, "classes", None)) is not None), None)
    whole = all(isinstance(value, (int, type(None))) for value in values)
    labels, names, reason = column_labels(values, list(names) if names is not None and whole else None)
    return labels, names, reason and f"the attribute with the labels of {kind} {reason}"


def label_values(dataset) -> list | None:
    """Return the labels of a dataset as a list, those of torch's Subset and ConcatDataset by their parts."""
    if isinstance(dataset, torch.utils.data.Subset):
        values = label_values(dataset.dataset)
        return None if values is None else [values[int(index)] for index in dataset.indices]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [label_values(part) for part in dataset.datasets]
        return None if None in parts else [value for part in parts for value in part]
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return dataset.tensors[1].tolist() if len(dataset.tensors) > 1 and dataset.tensors[1].ndim == 1 else None
    for name in LABELS:
        values = getattr(dataset, name, None)
        if isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1 or isinstance(values, (list, tuple)):
            return (
                values.tolist() if hasattr(values, "tolist") else [getattr(v, "item", lambda v=v: v)() for v in values]
            )
    return None


def parts_of(dataset) -> Iterator:
    """Iterate over a dataset and those that torch's Subset and ConcatDataset wrap."""
    yield dataset
    if isinstance(dataset, torch.utils.data.Subset):
        yield from parts_of(dataset.dataset)
    elif isinstance(dataset, torch.utils.data.ConcatDataset):
        yield from parts_of(dataset.datasets[0])

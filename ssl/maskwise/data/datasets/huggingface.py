"""Datasets of the Hugging Face `datasets` library, from disk or its cache; nothing is downloaded."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from maskwise.bounds import Count
from maskwise.data.datasets.contents import (
    FIRST_BYTES,
    OPENED,
    beginning,
    digest,
    names_digest,
    numbers_digest,
    sampled,
    size,
)
from maskwise.data.datasets.files import check_options, filter_classes, join_names, local_path
from maskwise.data.datasets.labels import column_labels
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import MAX_PIXELS, PixelLimit
from maskwise.data.decoding.multichannel import ValueRange
from maskwise.errors import UserError
from maskwise.storage.address import is_remote
from maskwise.storage.options import RemoteOptions

SAMPLED_ROWS = 256  # whose names and sizes identify a set: the encoded images themselves have to be read
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
OLDEST = 4  # major version of the library; earlier ones run a dataset's own script
CARDS = ("README.md", ".huggingface.yaml")  # in a folder, the library reads the names of data files from them
FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class HuggingFace:
    """One split of a dataset of the `datasets` library (extra `hf`).

    path: a folder written by `save_to_disk`, a folder of images or Parquet files, the name of a set in the library's
    cache, or Parquet files at s3://, gs://, http:// or https://, read as `remote` says; split: null takes `train`, or
    the only one; config: one of its configurations; image_column, label_column: by default the first image column and
    the first column of class labels; classes, per_class, channels, bits, max_pixels, value_range as `ImageFiles`.
    Labels that are null, empty or -1 are missing; a set that lacks some has none.
    `.labels` int64 [n] or None, `.classes` names or None, `.no_labels` the reason where they are None. Raises UserError
    where the library, the dataset, the split or a column is missing, for a requested label column that lacks labels,
    and for a dataset that would have to be downloaded.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        config: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        classes: str | Sequence[str] | None = None,
        per_class: Count | None = None,
        channels: int = 3,
        bits: int = 8,
        max_pixels: PixelLimit = MAX_PIXELS,
        value_range: ValueRange | None = None,
        remote: RemoteOptions | None = None,
    ):
        check_options(per_class, bits, value_range)
        self.path, self.split, self.value_range = str(path), split, value_range
        self.channels, self.bits, self.max_pixels = channels, bits, max_pixels
        table = open_split(self.path, split, config, remote or RemoteOptions())
        types = {name: type(feature).__name__ for name, feature in table.features.items()}
        files = (name for name, feature in table.features.items() if is_file(feature))
        pictures = first_of_type(types, "Image") or next(files, None)
        self.image_column = choose_column("image", image_column, types, pictures)
        if holds_bytes(table.features[self.image_column]):
            raise UserError(f"column {self.image_column} holds raw bytes; cast it to datasets.Image()")
        fallback = first_of_type(types, "ClassLabel") or next((name for name in LABEL_COLUMNS if name in types), None)
        column = choose_column("label", label_column, types, fallback, required=False)
        labels, names, reason = read_labels(table, column, self.path)
        if labels is None and label_column is not None:
            raise UserError(f"data.label_column: {reason}; label every row, or leave it out")
        self.notes = [f"{reason}: the set is used without labels"] if labels is None and column is not None else []
        self.no_labels = reason and f"{reason}; name one with labels as data.label_column"
        if labels is None and (classes is not None or per_class is not None):
            key = "classes" if classes is not None else "per_class"
            raise UserError(f"data.{key} needs labels, and {reason}")
        self.rows = None
        if labels is not None:
            self.rows, labels, names = filter_classes(labels, names, classes, per_class)
        self.table = undecoded(table.select_columns([self.image_column]), self.image_column)
        self.labels = None if labels is None else torch.from_numpy(np.array(labels, dtype=np.int64))
        self.classes = names

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def image(self, index: int) -> torch.Tensor:
        """Decode one image to uint8 (uint16 where bits is 16) [channels, H, W]. Raises CorruptImage."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            picture = self._stored(index)
        except Exception as error:  # the library raises many types
            raise multichannel.CorruptImage.because(self.name(index), error) from None
        limits = {"max_pixels": self.max_pixels, "value_range": self.value_range}
        if isinstance(picture, (str, bytes)):
            return multichannel.decode(picture, self.name(index), self.channels, self.bits, **limits)
        return multichannel.from_picture(picture, self.name(index), self.channels, self.bits, **limits)

    def stored_range(self, index: int) -> tuple[str, float, float] | None:
        """Return kind and range of the stored values of one image, None for 8-bit values."""
        try:
            return multichannel.stored_range(self._stored(index))
        except Exception:  # reported where the image is read
            return None

    def _stored(self, index: int):
        """Return an image as the library stores it: the bytes of a file, its path, or a picture."""
        picture = self._cell(index)
        if isinstance(picture, dict) and "bytes" in picture:
            return picture["path"] if picture["bytes"] is None else picture["bytes"]
        return picture

    def _cell(self, index: int):
        """Return an image as the library gives it: {"bytes", "path"} or a picture."""
        return self.table[index if self.rows is None else int(self.rows[index])][self.image_column]

    def name(self, index: int) -> str:
        """Return path, split and row of an image."""
        return f"{self.path}/{self.split or 'train'}/{index if self.rows is None else int(self.rows[index])}"

    def fingerprint(self) -> str:
        """Return a hex digest of the library's fingerprint and the selected rows."""
        rows = None if self.rows is None else self.rows.tolist()
        identity = f"{self.table._fingerprint} {len(self)} {rows} {self.channels} {self.bits}"
        return hashlib.sha256(identity.encode()).hexdigest()

    def contents(self) -> dict[str, str]:
        """Return digests of the selected rows, of names and sizes of some images and of the beginning of a few.

        The library's own fingerprint changes with its version and its cache.
        """
        names, sizes, few = [], [], []
        for index in sampled(len(self), SAMPLED_ROWS):
            try:
                picture = self._cell(index)
            except Exception:  # reported where the image is read
                picture = None
            encoded, path = (picture.get(key) if isinstance(picture, dict) else None for key in ("bytes", "path"))
            names.append(os.path.basename(path or ""))
            file = Path(path) if path and encoded is None else None
            sizes.append(len(encoded or b"") if file is None else size(file))
            few.append((encoded or b"")[:FIRST_BYTES] if file is None else beginning(file))
        rows = b"" if self.rows is None else np.asarray(self.rows, dtype="<i8").tobytes()
        few = few[:: max(1, len(few) // OPENED)]
        return {"names": digest(rows, names_digest(names)), "sizes": numbers_digest(sizes), "bytes": digest(*few)}


def first_of_type(types: dict[str, str], wanted: str) -> str | None:
    """Return the first column of a feature type, None where there is none."""
    return next((name for name, feature_type in types.items() if feature_type == wanted), None)


def is_file(feature) -> bool:
    """Return whether a column stores files as {bytes, path}, as a table does that lost its type of images."""
    return isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()


def holds_bytes(feature) -> bool:
    """Whether a column stores encoded images as plain bytes, which the library does not decode."""
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def read_labels(table, column: str | None, path: str) -> tuple[np.ndarray | None, list[str] | None, str | None]:
    """Read labels int64, class names and None, or (None, None, the reason) where there are none."""
    if column is None:
        return None, None, f"{path} has no column of labels"
    labels, names, reason = column_labels(table[column][:], getattr(table.features[column], "names", None))
    return labels, names, reason and f"column {column!r} of {path} {reason}"


def library():
    """Import the `datasets` library. Raises UserError where it is missing or runs code of datasets."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.name=huggingface needs the library `datasets`; pip install datasets, or choose data.name=folder"
        ) from None
    if int(datasets.__version__.split(".")[0]) < OLDEST:
        raise UserError(
            f"data.name=huggingface needs datasets>={OLDEST}, and {datasets.__version__} is installed; "
            "pip install -U datasets"
        )
    return datasets


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep the library and its Hub client off the network; the environment and the flags of the user stay.

    Both read the environment once, when they are imported, which may have happened before.
    """
    import huggingface_hub.constants

    modules = (library().config, huggingface_hub.constants)
    before = [(module, flag, getattr(module, flag)) for module in modules for flag in FLAGS if hasattr(module, flag)]
    for module, flag, _ in before:
        setattr(module, flag, True)
    try:
        yield
    finally:
        for module, flag, value in before:
            setattr(module, flag, value)


def refuse_remote_files(folder: Path) -> None:
    """Raise UserError for a folder whose card names data files on the network, which the library would look up."""
    for name in CARDS:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            card = yaml.safe_load(text.split("---", 2)[1] if name.endswith(".md") else text)
        except (OSError, ValueError, IndexError, yaml.YAMLError):
            continue  # no card, or none that the library can read
        configs = card.get("configs") if isinstance(card, dict) else None
        remote = next((text for text in texts_in(configs) if "://" in text), None)
        if remote is not None:
            raise UserError(
                f"data.path: {folder / name} names data files on the network ({remote[:80]}); "
                "download them into the folder and give their names there"
            )


def texts_in(content) -> Iterator[str]:
    """Iterate over the texts in nested lists and dicts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, dict)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from texts_in(part)


def open_split(path: str, split: str | None, config: str | None, remote: RemoteOptions):
    """Open one split with the library, offline, or Parquet files in storage. Raises UserError."""
    datasets = library()
    if is_remote(path):
        if config is not None:
            raise UserError(f"data.config chooses in a dataset's card, and {path} is read as files; leave it out")
        from maskwise.data.datasets.remote_parquet import RemoteParquet

        return RemoteParquet(path, split, remote)
    folder = local_path(path)
    try:
        with offline():
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                return saved_split(datasets.load_from_disk(str(folder)), path, split)
            refuse_remote_files(folder)
            content = datasets.load_dataset(str(folder) if folder.exists() else path, config, split=split)
        return saved_split(content, path, split) if split is None else content
    except UserError:
        raise
    except Exception as error:  # a dozen types for missing, not cached and unknown split
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, ConnectionError):  # the library would ask the network
            text = "there is no such folder, and the library's cache does not hold it"
        raise UserError(
            f"data.path: cannot open {path} split {split or 'train'!r} ({text}); "
            "give a folder on disk or a set in the library's cache, nothing is downloaded"
        ) from None


def saved_split(content, path: str, split: str | None):
    """Select a split of a DatasetDict, or take a Dataset that is this split. Raises UserError where there is none."""
    if not isinstance(content, dict):
        own = None if content.split is None else str(content.split)
        if split in (None, own or "train"):
            return content
        holds = f"only the split {own!r}" if own else "one split without a name"
        raise UserError(
            f"data.split: {path} holds {holds}, not {split!r}; leave the split out to use it, "
            "or give the folder of the other one (data.test_path)"
        )
    if split is None:
        split = "train" if "train" in content or len(content) != 1 else next(iter(content))
    if split not in content:
        raise UserError(f"data.split: {path} has no split {split!r}; it has {join_names(list(content))}")
    return content[split]


def undecoded(table, column: str):
    """Make the library return encoded bytes, so that the decoder of this package reads them."""
    import datasets

    if not isinstance(table.features[column], datasets.Image):
        return table
    return table.cast_column(column, datasets.Image(decode=False))


def choose_column(
    role: str, requested: str | None, types: dict[str, str], fallback: str | None, required: bool = True
) -> str | None:
    """Return the requested column, or the fallback. Raises UserError where there is none."""
    if requested in types or (requested is None and (fallback is not None or not required)):
        return requested or fallback
    columns = join_names([f"{name} ({feature_type})" for name, feature_type in types.items()])
    missing = requested or "of images"
    remedy = "" if requested else f"; name one as data.{role}_column, or cast it to datasets.Image()"
    raise UserError(f"data.{role}_column: there is no column {missing}; there are {columns}{remedy}")

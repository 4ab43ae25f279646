"""Sets of the Hugging Face `datasets` library that are on disk or in its cache; nothing is downloaded."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from maskwise.data import bands
from maskwise.data.decode import MAX_PIXELS
from maskwise.data.files import narrowed, shortened
from maskwise.functional.errors import UserError

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


class HuggingFace:
    """A split of a dataset of the `datasets` library (extra `hf`).

    path: a folder written by `save_to_disk`, a folder of images or Parquet files, or the name of a set in the
    library's cache; split; config: the name of one of its configurations; image_column, label_column: by default the
    first column of images and the first of class labels; classes, per_class, channels, bits, max_pixels as `Files`.
    `.labels` int64 [n] or None, `.classes` names or None. Raises UserError without the library, for a set, split or
    column that is not there, and for a set that would have to be downloaded.
    """

    def __init__(self, path, split: str | None = None, config: str | None = None, image_column: str | None = None, label_column: str | None = None,
                 classes=None, per_class: int | None = None, channels: int = 3, bits: int = 8, max_pixels: int = MAX_PIXELS):
        self.path, self.split, self.channels, self.bits, self.max_pixels = str(path), split, channels, bits, max_pixels
        held = opened(self.path, split or "train", config)
        columns = held.features
        kinds = {name: type(kind).__name__ for name, kind in columns.items()}
        self.image_column = chosen("image", image_column, kinds, next((name for name, kind in kinds.items() if kind == "Image"), None))
        fallback = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None) or next((name for name in LABEL_COLUMNS if name in kinds), None)
        label_column = chosen("label", label_column, kinds, fallback, required=False)
        labels = names = None
        if label_column is not None:
            values = held[label_column][:]
            names = getattr(columns[label_column], "names", None)
            if names is None:
                kinds_said = sorted(set(values))
                names, values = [str(kind) for kind in kinds_said], [kinds_said.index(value) for value in values]
            labels = np.asarray(values, dtype=np.int64)
            if labels.size and labels.min() < 0:  # unlabelled parts of a labelled set
                labels = names = None
        if labels is None and (classes is not None or per_class is not None):
            raise UserError(f"data.{'classes' if classes is not None else 'per_class'}: {self.path} has no labels; name data.label_column, or leave it out")
        self.rows = None
        if labels is not None:
            self.rows, labels, names = narrowed(labels, names, classes, per_class)
        self.held = as_files(held.select_columns([self.image_column]), self.image_column)
        self.labels, self.classes = None if labels is None else torch.from_numpy(np.array(labels, dtype=np.int64)), names

    def __len__(self) -> int:
        return len(self.held) if self.rows is None else len(self.rows)

    def image(self, index: int) -> torch.Tensor:
        """One image, uint8 (uint16 where bits is 16) [channels, H, W]. Raises decode.CorruptImage."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            picture = self.held[index if self.rows is None else int(self.rows[index])][self.image_column]
        except Exception as error:  # its own reading of bytes, of any sort
            raise bands.CorruptImage(self.name(index), " ".join(str(error).split())[:200] or type(error).__name__) from None
        if isinstance(picture, dict) and "bytes" in picture:
            source = picture["path"] if picture["bytes"] is None else picture["bytes"]
            return bands.decode(source, self.name(index), self.channels, self.bits, max_pixels=self.max_pixels)
        return bands.from_picture(picture, self.name(index), self.channels, self.bits, max_pixels=self.max_pixels)

    def name(self, index: int) -> str:
        """Set, split and place of an image."""
        return f"{self.path}/{self.split or 'train'}/{index if self.rows is None else int(self.rows[index])}"

    def fingerprint(self) -> str:
        """Hex digest of the library's own fingerprint and of what was chosen of it."""
        rows = None if self.rows is None else self.rows.tolist()
        return hashlib.sha256(f"{self.held._fingerprint} {len(self)} {rows} {self.channels} {self.bits}".encode()).hexdigest()


def opened(path: str, split: str, config: str | None):
    """The library's dataset of one split. Raises UserError."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"  # read by the versions before 4, which ran a set's own script
    try:
        import datasets
    except ImportError:
        raise UserError("data.name=huggingface needs the library `datasets`; pip install datasets, or choose data.name=folder") from None
    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            held = datasets.load_from_disk(str(folder))
            if isinstance(held, datasets.DatasetDict):
                if split not in held:
                    raise UserError(f"data.split: {path} has no split {split!r}; it has {shortened(list(held))}")
                held = held[split]
            return held
        return datasets.load_dataset(str(folder) if folder.exists() else path, config, split=split)
    except UserError:
        raise
    except Exception as error:  # a dozen types for "not there", "not cached" and "no such split"
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.path: cannot open {path} split {split!r} ({text}); give a folder on disk or a set in the library's cache, nothing is downloaded") from None


def as_files(held, column: str):
    """The set with its images as files, undecoded: they are for our own decoder, as those of folders are."""
    import datasets

    return held.cast_column(column, datasets.Image(decode=False)) if isinstance(held.features[column], datasets.Image) else held


def chosen(what: str, asked: str | None, kinds: dict[str, str], fallback: str | None, required: bool = True) -> str | None:
    """The column asked for, or the one found. Raises UserError where there is none."""
    if asked is not None and asked not in kinds or asked is None and fallback is None and required:
        raise UserError(f"data.{what}_column: there is no column {asked or 'of images'}; there are {shortened([f'{name} ({kind})' for name, kind in kinds.items()])}")
    return asked or fallback

"""Reading of embedding files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.data.decoding.image import CorruptImage
from maskwise.data.decoding.multichannel import decode
from maskwise.embedding.formats import INDEX, SUFFIXES, beside, csv_rows, parquet, read_settings
from maskwise.errors import UserError

ROWS_AT_A_TIME = 65536


@dataclass(frozen=True)
class Embeddings:
    """One vector per image: those of a file, or of a dataset embedded in memory.

    vectors [n, D], of a file float32; paths as the dataset names its images; labels int64 [n] (-1: none) or None;
    sizes int64 [n, 2], widths and heights in pixels; root: the folder that the paths start from, None where the images
    are no files; meta: the settings of the file, {} without one; dataset, index int64 [n]: where the images are read
    from, None: from the files.
    """

    vectors: Tensor
    paths: Sequence[str]
    labels: Tensor | None
    sizes: Tensor
    root: Path | None
    meta: dict
    dataset: object | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def classes(self) -> list[str] | None:
        """Names of the labels."""
        return self.meta.get("classes") if self.dataset is None else getattr(self.dataset, "classes", None)

    def picture(self, row: int) -> Tensor | None:
        """Return the image of a row, uint8 [C, H, W], None where it cannot be read."""
        try:
            if self.dataset is not None:
                return self.dataset.image(int(self.index[row]))
            if self.root is None:
                return None
            return decode(self.root / self.paths[row], self.paths[row])
        except CorruptImage:
            return None


def is_embeddings(path) -> bool:
    """Return whether a path names an embedding file."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    return path.suffix.lower() != ".csv" or read_settings(path) is not None


def open_embeddings(path, feature: str | None = None) -> Embeddings:
    """Read the vectors of a file that `maskwise embed` wrote; NPY vectors stay on the disk.

    feature: of a file with several, by default the first. Raises UserError for another file or feature.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file that `maskwise embed` wrote")
    meta = read_settings(path) if path.suffix.lower() in SUFFIXES else None
    if meta is None:
        raise UserError(f"{path} was not written by `maskwise embed` (or its .json is missing); give such a file")
    column = column_of(path, meta, feature)
    read = {".parquet": read_parquet, ".csv": read_csv, ".npy": read_npy}[path.suffix.lower()]
    try:
        vectors, paths, labels, sizes = read(path, column, meta["rows"])
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); embed the images again") from None
    if len(vectors) != meta["rows"] or len(paths) != meta["rows"]:
        raise UserError(f"{path} has {len(paths)} rows and its settings say {meta['rows']}; embed the images again")
    root = Path(meta["root"]) if meta["root"] else None
    labels = None if labels is None or bool((labels < 0).all()) else labels
    return Embeddings(vectors, paths, labels, sizes, root, meta)


def column_of(path: Path, meta: dict, feature: str | None) -> str:
    """Return the column of a feature. Raises UserError where the file has no vectors of it."""
    columns = {feature: column for column, feature in meta["columns"].items()}
    if not columns:
        raise UserError(f"{path} holds {', '.join(meta['features'])} and no vectors; embed with features=pooled")
    if feature is None:
        return next(iter(columns.values()))
    if feature not in columns:
        raise UserError(f"{path} has no feature {feature}; it has {', '.join(columns)}")
    return columns[feature]


def read_parquet(path: Path, column: str, rows: int):
    """Read vectors, paths, labels and sizes of a Parquet file, one row group at a time."""
    vectors, paths, labels, sizes = None, [], [], []
    with parquet()[1].ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=["path", "label", "width", "height", column]):
            part = batch.column(column)
            values = part.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(batch), -1)
            if vectors is None:
                vectors = torch.empty(rows, values.shape[1])
            vectors[len(paths) : len(paths) + len(batch)] = torch.from_numpy(values)
            paths += batch.column("path").to_pylist()
            labels += [-1 if label is None else label for label in batch.column("label").to_pylist()]
            sizes += zip(batch.column("width").to_pylist(), batch.column("height").to_pylist())
    return vectors, paths, torch.tensor(labels), torch.tensor(sizes)


def read_csv(path: Path, column: str, rows: int):
    """Read vectors, paths, labels and sizes of a CSV file."""
    vectors, index = None, []
    for number, row in enumerate(csv_rows(path)):
        if vectors is None:
            names = [name for name in row if name.startswith(f"{column}_")]
            vectors = torch.empty(rows, len(names))
        vectors[number] = torch.tensor([float(row[name]) for name in names])
        index.append({name: row[name] for name in ("path", "label", "width", "height")})
    return vectors, *index_columns(index)


def read_npy(path: Path, column: str, rows: int):
    """Map the vectors of an NPY file, and read the index beside it."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    mapped = np.load(path, mmap_mode="c", allow_pickle=False) if stored.dtype == np.float32 else stored.astype("f4")
    return torch.from_numpy(mapped), *index_columns(list(csv_rows(beside(path, INDEX))))


def index_columns(index: list[dict[str, str]]) -> tuple[list[str], Tensor, Tensor]:
    """Return paths, labels (-1: none) and sizes of the rows of an index."""
    labels = torch.tensor([int(row["label"] or -1) for row in index])
    return (
        [row["path"] for row in index],
        labels,
        torch.tensor([(int(row["width"]), int(row["height"])) for row in index]),
    )

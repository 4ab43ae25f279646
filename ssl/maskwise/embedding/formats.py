"""File formats of embeddings: one row per image in Parquet or CSV, or vectors in NPY with an index beside them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskwise.engine.atomic_file import sync
from maskwise.errors import UserError

SUFFIXES = (".parquet", ".csv", ".npy")
PARQUET_KEY = b"maskwise"  # of the metadata in a Parquet file
DTYPES = ("float32", "float16")
GROUP_ROWS = 4096  # least rows of a Parquet row group, the last one aside
INDEX, SETTINGS, UNREADABLE = ".index.csv", ".json", ".unreadable.csv"
INDEX_COLUMNS = ("path", "label", "class_name", "width", "height")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of an embedding file.

    paths, labels (None without), class_names (None without), widths and heights in pixels: one per row; vectors:
    column -> float array [m, D]; arrays: feature -> float array [m, ...].
    """

    paths: list[str]
    labels: list[int] | None
    class_names: list[str] | None
    widths: list[int]
    heights: list[int]
    vectors: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]


def kind_of(path: Path) -> str:
    """Return the ending that chooses a format. Raises UserError for another one and for a missing library."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"--to {path}: give a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if kind == ".parquet":
        parquet()
    return kind


def parquet():
    """Return pyarrow and its module parquet. Raises UserError where pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet files need pyarrow: pip install pyarrow (extra embed), or give a file that ends in .csv or .npy"
        ) from None
    return pyarrow, pyarrow.parquet


def beside(path: Path, ending: str) -> Path:
    """Return the path of a file that belongs to an embedding file: x.csv, .json -> x.csv.json."""
    return path.with_name(path.name + ending)


def array_file(path: Path, feature: str, only: bool) -> Path:
    """Return the NPY file of a feature with several rows per image; the only one of x.npy is x.npy itself."""
    return path if only and path.suffix.lower() == ".npy" else beside(path, f".{feature}.npy")


class Writer:
    """Write blocks into temporary files beside `path`; `finish` renames them into place, that of `path` last.

    meta: stored as JSON, in a Parquet file or beside another one; vectors, arrays: the axes of one row by column and
    by feature; rows: how many will come. Only one block is held in memory, in Parquet at least GROUP_ROWS rows.
    """

    def __init__(self, path: Path, meta: dict, vectors: dict[str, tuple], arrays: dict[str, tuple], rows: int):
        self.path, self.meta, self.rows, self.written = path, meta, rows, 0
        self.kind, self.dtype = kind_of(path), np.dtype(meta["dtype"])
        self.opened = contextlib.ExitStack()
        self.temporary: dict[Path, Path] = {}  # final path -> temporary one, in the order of the renames
        self.files = {}
        for name, shape in arrays.items():
            self.files[name] = self._array(array_file(path, name, only=not vectors and len(arrays) == 1), shape)
        if self.kind == ".parquet":
            self.table = ParquetTable(self._aside(path), meta, vectors, self.dtype)
        elif self.kind == ".csv":
            self.table = CsvTable(self._aside(path), vectors)
        else:
            self.table = CsvTable(self._aside(beside(path, INDEX)), {})
            for name, shape in vectors.items():
                self.files[name] = self._array(path, shape)
        self.opened.callback(self.table.close)

    def write(self, block: Block) -> None:
        """Append a block."""
        for name, rows in (*block.arrays.items(), *block.vectors.items()):
            if name in self.files:
                self.files[name].write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.table.write(block)
        self.written += len(block.paths)

    def finish(self, unreadable: dict[str, str]) -> None:
        """Close all files, write settings and unreadable images, and rename everything into place."""
        assert self.written == self.rows, "rows counted first"
        self.opened.close()
        if self.kind != ".parquet":
            settings = self._aside(beside(self.path, SETTINGS))
            settings.write_text(json.dumps(self.meta, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        listed = beside(self.path, UNREADABLE)
        if unreadable:
            with open(self._aside(listed), "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *sorted(unreadable.items())])
        else:
            listed.unlink(missing_ok=True)
        for final, temporary in sorted(self.temporary.items(), key=lambda pair: pair[0] == self.path):
            sync(temporary)
            os.replace(temporary, final)

    def discard(self) -> None:
        """Close and remove the temporary files."""
        with contextlib.suppress(OSError, ValueError):  # a full disk also refuses the rest of a closed file
            self.opened.close()
        for temporary in self.temporary.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _aside(self, final: Path) -> Path:
        self.temporary[final] = final.with_name(f".{final.name}.writing")
        return self.temporary[final]

    def _array(self, final: Path, shape: tuple):
        file = self.opened.enter_context(open(self._aside(final), "wb"))
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *shape),
        }
        np.lib.format.write_array_header_1_0(file, header)
        return file


class ParquetTable:
    """Rows of a Parquet file; a vector is a list of fixed size."""

    def __init__(self, path: Path, meta: dict, vectors: dict[str, tuple], dtype: np.dtype):
        self.arrow, parquet_module = parquet()
        arrow = self.arrow
        self.types = {name: arrow.list_(arrow.from_numpy_dtype(dtype), shape[0]) for name, shape in vectors.items()}
        self.dtype, self.waiting, self.count = dtype, [], 0
        fields = [("path", arrow.string()), ("label", arrow.int64()), ("class_name", arrow.string())]
        fields += [("width", arrow.int32()), ("height", arrow.int32()), *self.types.items()]
        text = json.dumps(meta, sort_keys=True).encode()
        self.schema = arrow.schema(fields, metadata={PARQUET_KEY: text})
        self.writer = parquet_module.ParquetWriter(path, self.schema, compression="zstd")

    def write(self, block: Block) -> None:
        """Append a block; row groups of a few rows would make the file slow to read."""
        arrow, count = self.arrow, len(block.paths)
        columns = [
            arrow.array([valid_text(path) for path in block.paths], arrow.string()),
            arrow.array(block.labels or [None] * count, arrow.int64()),
            arrow.array(block.class_names or [None] * count, arrow.string()),
            arrow.array(block.widths, arrow.int32()),
            arrow.array(block.heights, arrow.int32()),
        ]
        for name, kind in self.types.items():
            values = arrow.array(np.ascontiguousarray(block.vectors[name], self.dtype).reshape(-1))
            columns.append(arrow.FixedSizeListArray.from_arrays(values, type=kind))
        self.waiting.append(arrow.Table.from_arrays(columns, schema=self.schema))
        self.count += count
        if self.count >= GROUP_ROWS:
            self._write_group()

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        try:
            self._write_group()
        finally:
            self.writer.close()

    def _write_group(self) -> None:
        if self.count:
            table = self.arrow.concat_tables(self.waiting).combine_chunks()
            self.waiting, self.count = [], 0
            self.writer.write_table(table, row_group_size=len(table))


class CsvTable:
    """Rows of a CSV file; a vector has one column per dimension, such as vector_0."""

    def __init__(self, path: Path, vectors: dict[str, tuple]):
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.rows, self.names = csv.writer(self.file, lineterminator="\n"), tuple(vectors)
        dimensions = [f"{name}_{k}" for name, shape in vectors.items() for k in range(shape[0])]
        self.rows.writerow([*INDEX_COLUMNS, *dimensions])

    def write(self, block: Block) -> None:
        """Append a block; numbers have the fewest digits that give the same float."""
        count = len(block.paths)
        labels = block.labels or [""] * count
        names = block.class_names or [""] * count
        about = zip(map(valid_text, block.paths), labels, names, block.widths, block.heights)
        numbers = [block.vectors[name].astype(str) for name in self.names]
        self.rows.writerows([*row, *(number for part in numbers for number in part[k])] for k, row in enumerate(about))

    def close(self) -> None:
        """End the file."""
        self.file.close()


def valid_text(name: str) -> str:
    """Return a file name as Unicode: bytes that are not UTF-8 become escapes."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_settings(path: Path) -> dict | None:
    """Return the settings stored with an embedding file; None where it was not written by maskwise."""
    with contextlib.suppress(OSError, ValueError):
        if path.suffix.lower() == ".parquet":
            module = parquet()[1]
            text = (module.read_schema(path).metadata or {}).get(PARQUET_KEY)
        else:
            text = beside(path, SETTINGS).read_text(encoding="utf-8")
        meta = json.loads(text) if text else None
        return meta if isinstance(meta, dict) and "model" in meta else None
    return None


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Iterate over the rows of a CSV file by column name."""
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)

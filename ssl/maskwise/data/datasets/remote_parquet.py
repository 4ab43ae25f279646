"""Parquet files in object storage or on a web server, with the interface of a table of the `datasets` library."""

from __future__ import annotations

import bisect
import collections
import hashlib
import io
import itertools
import re
import threading
from typing import Any

from maskwise.data.datasets.remote_tars import has_wildcard
from maskwise.errors import UserError
from maskwise.storage.address import check, protocol_of
from maskwise.storage.cache_folder import cache_folder
from maskwise.storage.options import GIB, RemoteOptions
from maskwise.storage.range_cache import RangeCache
from maskwise.storage.range_file import RangeFile
from maskwise.storage.range_reader import RangeReader
from maskwise.storage.store import Patience, Store

KEY = "data.path"
HELD = 4  # row groups that a process holds: an image is read with its group


class RangesFile(io.RawIOBase):
    """A file as a stream that reads exactly what is asked for, so that the cache finds it again."""

    def __init__(self, reader: RangeReader, number: int, size: int):
        self.reader, self.number, self.size, self.place = reader, number, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position and return it."""
        self.place = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence] + offset
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, fewer at the end only."""
        rest = max(0, self.size - self.place)
        count = rest if size is None or size < 0 else min(size, rest)
        data = self.reader.read(self.number, self.place, count) if count else b""
        self.place += count
        return data


class RemoteParquet:
    """Rows of Parquet files at an address: their footers are read at once, an image with its row group.

    `.features` is that of the `datasets` library. Raises UserError where there are no files, and for files with other
    columns than the first.
    """

    def __init__(self, path: str, split: str | None, options: RemoteOptions):
        import datasets
        import pyarrow.parquet as parquet

        check(path, KEY)
        store = Store(KEY, Patience(options.timeout))
        addresses = of_split(path, find(path, store), split)
        self.reader = RangeReader(addresses, store, reads=options.reads)
        versions = self.reader.map(store.version, addresses)
        if (home := cache_folder()) is not None and options.cache:
            files = [(address, version.tag) for address, version in zip(addresses, versions)]
            self.reader.cache = RangeCache(home / "ranges", round(options.cache * GIB), files)
        self.sizes = [version.size for version in versions]
        self.footers = self.reader.map(lambda item: footer(store, *item), list(zip(addresses, self.sizes)))
        schemas = [one.schema.to_arrow_schema() for one in self.footers]
        for address, schema in zip(addresses, schemas):
            if schema.names != schemas[0].names:
                raise UserError(f"{KEY}: {address} has other columns than {addresses[0]}; give files of one set")
        self.features = datasets.Features.from_arrow_schema(schemas[0])
        self.groups = [(file, group) for file, one in enumerate(self.footers) for group in range(one.num_row_groups)]
        counts = [self.footers[file].row_group(group).num_rows for file, group in self.groups]
        self.ends = list(itertools.accumulate(counts))
        tags = " ".join(f"{address} {version}" for address, version in zip(addresses, versions))
        self._fingerprint = hashlib.sha256(tags.encode()).hexdigest()[:16]
        self._parquet, self.columns = parquet, list(self.features)
        self._reset()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, key: int | str) -> Any:
        """Return a row as {column: value}, or all values of a column."""
        if isinstance(key, str):
            parts = self.reader.map(lambda number: self._read(number, [key])[key], list(range(len(self.groups))))
            return list(itertools.chain(*parts))
        number = bisect.bisect_right(self.ends, key)
        row = key - (self.ends[number - 1] if number else 0)
        return {name: column[row].as_py() for name, column in self._group(number).items()}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_held", "_lock", "_parquet")}

    def __setstate__(self, state: dict) -> None:
        import pyarrow.parquet as parquet

        self.__dict__.update(state)
        self._parquet = parquet
        self._reset()

    def select_columns(self, columns: list[str]) -> RemoteParquet:
        """Read only these columns of a row."""
        self.columns = columns
        self.features = type(self.features)({name: self.features[name] for name in columns})
        return self

    def cast_column(self, column: str, feature) -> RemoteParquet:
        """Change the type of a column; the values are read as they are stored."""
        self.features[column] = feature
        return self

    def _group(self, number: int) -> dict:
        with self._lock:
            future = self._held.get(number)
            if future is None:
                future = self._held[number] = Once(lambda: self._columns(number))
            self._held.move_to_end(number)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return future.value()

    def _columns(self, number: int) -> dict:
        table = self._table(number, self.columns)
        return {name: table.column(name).combine_chunks() for name in self.columns}

    def _read(self, number: int, columns: list[str]) -> dict[str, list]:
        return self._table(number, columns).to_pydict()

    def _table(self, number: int, columns: list[str]):
        file, group = self.groups[number]
        source = RangesFile(self.reader, file, self.sizes[file])
        opened = self._parquet.ParquetFile(source, metadata=self.footers[file], pre_buffer=False)
        return opened.read_row_group(group, columns=columns, use_threads=False)

    def _reset(self) -> None:
        self._held: collections.OrderedDict[int, Once] = collections.OrderedDict()
        self._lock = threading.Lock()


class Once:
    """Compute a value in the first thread that asks for it."""

    def __init__(self, function):
        self.function, self.lock, self.done = function, threading.Lock(), False

    def value(self):
        """Return the value."""
        with self.lock:
            if not self.done:
                self.result = self.function()
                self.done = True
            return self.result


def footer(store: Store, address: str, size: int):
    """Read the footer of a Parquet file. Raises UserError for another file."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_metadata(RangeFile(store, address, size))
    except pyarrow.ArrowInvalid as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(f"{KEY}: {address} is not a Parquet file ({text}); give files ending in .parquet") from None


def find(path: str, store: Store) -> list[str]:
    """List the Parquet files of an address: one, a pattern, or those below a folder."""
    if path.lower().endswith(".parquet") and not has_wildcard(path):
        return [path]
    if protocol_of(path) in ("http", "https"):
        raise UserError(f"{KEY}: {path} cannot be listed over HTTP; give the address of a .parquet file")
    found = store.listing(path, path if has_wildcard(path) else None)
    files = [name for name in found if name.lower().endswith(".parquet")]
    if not files:
        raise UserError(f"{KEY}: no .parquet files in {path}; give a file, a folder of them or a pattern")
    return files


def of_split(path: str, files: list[str], split: str | None) -> list[str]:
    """Select the files of a split: in a folder of that name, or with a name that begins with it.

    null: those of `train` where there are any, else all. Raises UserError for a split without files.
    """
    start = path.rstrip("/") + "/"
    chosen = [file for file in files if belongs(file.removeprefix(start), split or "train")]
    if split and not chosen:
        raise UserError(
            f"data.split: no .parquet files of split {split!r} in {path}; leave the split out, or name another"
        )
    return chosen or files


def belongs(name: str, split: str) -> bool:
    """Return whether the name of a file, below the folder that was given, tells that it is of a split."""
    *folders, file = name.split("/")
    return split in folders or re.match(rf"{re.escape(split)}([-_.]|$)", file) is not None

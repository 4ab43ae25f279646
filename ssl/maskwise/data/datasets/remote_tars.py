"""Tar files in object storage or on a web server: which there are, and the index of their members."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from maskwise.data.datasets.packed_strings import PackedStrings
from maskwise.data.datasets.tar_members import members_of
from maskwise.errors import UserError
from maskwise.process.streams import print_notice
from maskwise.storage.address import check, protocol_of
from maskwise.storage.cache_folder import cache_folder
from maskwise.storage.options import GIB, RemoteOptions
from maskwise.storage.range_cache import RangeCache
from maskwise.storage.range_file import RangeFile
from maskwise.storage.range_reader import RangeReader
from maskwise.storage.store import Patience, Store, Version

KEY = "data.path"
LONGEST_LABEL = 64  # bytes of a .cls member that the index keeps


class Index(NamedTuple):
    """Members of one tar file: (name, offset, bytes) of each, and the texts of .cls members by name."""

    members: list[tuple[str, int, int]]
    texts: dict[str, bytes]


def open_remote(path: str, split: str | None, expand, options: RemoteOptions) -> tuple[RangeReader, list[Index]]:
    """Find the tar files of an address and read or load their indices; returns the reader of their bytes too.

    expand: makes a list of a pattern with {000..146}. Raises UserError where there are none.
    """
    check(path, KEY)
    store = Store(KEY, Patience(options.timeout))
    addresses = find(path, split, expand, store)
    reader = RangeReader(addresses, store, reads=options.reads)
    versions = reader.map(store.version, addresses)
    home = cache_folder()
    if home is not None and options.cache:
        files = [(address, version.tag) for address, version in zip(addresses, versions)]
        reader.cache = RangeCache(home / "ranges", round(options.cache * GIB), files)
    found = reader.map(lambda item: load(home, *item), list(zip(addresses, versions)))
    missing = [k for k, index in enumerate(found) if index is None]
    if missing:
        size = sum(versions[k].size for k in missing) / 1e9
        print_notice(f"reading the index of {len(missing)} tar files in {path} ({size:.3g} GB), once")
        built = reader.map(lambda k: build(home, store, addresses[k], versions[k]), missing)
        for k, index in zip(missing, built):
            found[k] = index
    return reader, found


def find(path: str, split: str | None, expand, store: Store) -> list[str]:
    """List the addresses of the tar files of a path: one, a pattern or a folder, and a split of it."""
    if split:
        if is_pattern(path) or path.lower().endswith(".tar"):
            raise UserError(f"data.split needs a folder of tar files, and data.path is {path}; leave data.split out")
        path = f"{path.rstrip('/')}/{split}"
    numbered = expand(path)
    if len(numbered) == 1 and not path.lower().endswith(".tar") and not has_wildcard(path):
        numbered = [f"{path.rstrip('/')}/*.tar"]
    addresses = []
    for one in numbered:
        if not has_wildcard(one):
            addresses.append(one)
            continue
        if protocol_of(one) in ("http", "https"):
            raise UserError(
                f"{KEY}: {one} cannot be listed over HTTP; give a tar file or numbers such as train-{{0000..0146}}.tar"
            )
        addresses += store.listing(one, one)
    if not addresses:
        raise UserError(f"{KEY}: no .tar files in {path}; give a tar file, a folder of them or a pattern")
    return addresses


def has_wildcard(path: str) -> bool:
    """Return whether a path matches by *, ? or [."""
    return any(letter in path for letter in "*?[")


def is_pattern(path: str) -> bool:
    """Return whether a path stands for several files by its spelling."""
    return has_wildcard(path) or "{" in path


def build(home: Path | None, store: Store, address: str, version: Version) -> Index:
    """Read the index of one tar file and cache it; of several processes on a machine only one reads it."""
    with one_at_a_time(home, address):
        index = load(home, address, version)
        if index is None:
            index = read_index(store, address, version)
            save(home, address, version, index)
    return index


def read_index(store: Store, address: str, version: Version) -> Index:
    """Walk through the headers of a tar file by ranges."""
    file = io.BufferedReader(RangeFile(store, address, version.size), 512)
    index = Index(members_of(file, address), {})
    for name, start, size in index.members:
        if os.path.splitext(name)[1] == ".cls":
            file.seek(start)
            index.texts[name] = file.read(min(size, LONGEST_LABEL))
    return index


def cache_file(home: Path, address: str) -> Path:
    """Return the cache file for the index of a tar file."""
    return home / "tar" / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.npz"


def load(home: Path | None, address: str, version: Version) -> Index | None:
    """Load a cached index; None where it is missing, damaged or of another version of the file."""
    if home is None or not version.tag:
        return None
    try:
        with np.load(cache_file(home, address), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["version"] != list(version):
                return None
            names = PackedStrings(arrays["blob"].tobytes(), arrays["ends"])
            members = [(name, *place) for name, place in zip(names, arrays["places"].tolist())]
            texts = {name: text.encode("latin-1") for name, text in about["texts"].items()}
            return Index(members, texts)
    except Exception:  # missing, truncated or of another format
        return None


def save(home: Path | None, address: str, version: Version, index: Index) -> None:
    """Cache an index; an unwritable cache folder is ignored."""
    if home is None:
        return
    path = cache_file(home, address)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    names = PackedStrings.of(name for name, _, _ in index.members)
    texts = {name: text.decode("latin-1") for name, text in index.texts.items()}
    about = json.dumps({"version": list(version), "texts": texts}).encode()
    places = np.array([place for _, *place in index.members], dtype=np.int64).reshape(-1, 2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            blob = np.frombuffer(names.blob, np.uint8)
            np.savez(file, blob=blob, ends=names.ends, places=places, about=np.frombuffer(about, np.uint8))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(home: Path | None, address: str) -> Iterator[None]:
    """Hold a lock beside the cache file of an index; without a cache or locks, nothing."""
    handle = None
    if home is not None:
        path = cache_file(home, address).with_suffix(".lock")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def names_of(addresses: list[str]) -> list[PurePosixPath]:
    """Return addresses as paths, of which only the names are used."""
    return [PurePosixPath(address) for address in addresses]

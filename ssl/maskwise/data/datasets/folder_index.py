"""List image files under a folder; cache the listing of large folders."""

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskwise.data.datasets.left_out import (
    FILE,
    FOLDER,
    HIDDEN,
    OWN,
    OWN_NAMES,
    REPEATED,
    SYSTEM_FOLDERS,
    image_endings,
    is_own,
    key_of,
)
from maskwise.data.datasets.packed_strings import PackedStrings
from maskwise.errors import UserError
from maskwise.storage.cache_folder import cache_folder

CACHE_FROM = 10_000  # files; smaller folders are listed each time, in a fraction of a second
SETTLED = 2.0  # seconds since the last change of a folder: a second change could share its time stamp
VERSION = 3


def scan(root: Path, extensions: tuple[str, ...] | None = None) -> tuple[PackedStrings, Counter]:
    """List image files under a folder, relative and sorted, and count the other files by ending or kind.

    extensions: in lower case; None: those of 8-bit images. Links to folders are followed, but no folder is listed
    twice; names that begin with a dot are skipped, and folders of the system (`left_out.SYSTEM_FOLDERS`) and of
    maskwise (`left_out.OWN_FILES`). Large listings are cached in the user's cache folder (`MASKWISE_CACHE`, else
    `XDG_CACHE_HOME`, else ~/.cache; `MASKWISE_CACHE=none`: never) with the time stamps of all folders; a changed one
    invalidates them. Raises UserError for unreadable folders and for one that maskwise wrote.
    """
    extensions = image_endings() if extensions is None else extensions
    cache = cache_file(root, extensions)
    cached = load_cache(cache, root) if cache else None
    if cached is not None:
        return cached
    started = time.time()
    files, others, stamps = walk(root, extensions)
    names = PackedStrings.of(sorted(files, key=os.fsencode))  # the same order in every locale
    if cache and len(names) >= CACHE_FROM and max(stamps.values()) < (started - SETTLED) * 1e9:
        save_cache(cache, names, others, stamps)
    return names, others


def walk(root: Path, extensions: tuple[str, ...]) -> tuple[list[str], Counter, dict[str, int]]:
    """Walk a folder -> relative image files, counts of others by ending or kind, time stamps of folders in ns."""
    files: list[str] = []
    others: Counter = Counter()
    stamps: dict[str, int] = {}
    pending, links = [""], []
    visited: dict[tuple[int, int], str] = {}
    while pending or links:
        if not pending:  # links last and in order, so that the names do not depend on the order of the disk
            links.sort(key=os.fsencode)
            pending.append(links.pop(0))
        prefix = pending.pop()
        try:
            status = os.stat(root / prefix)
            first = visited.setdefault((status.st_dev, status.st_ino), prefix)
            if first != prefix:
                others[REPEATED] += not prefix.startswith(first)  # a link to a folder above is no second one
                continue
            entries = read_folder(root, prefix, extensions)
        except OSError as error:
            raise UserError(f"data.path: cannot read {error.filename}: {error.strerror}") from None
        if entries is None:
            others[OWN] += 1
            continue
        stamps[prefix] = status.st_mtime_ns
        files += entries.files
        pending += entries.folders
        links += entries.links
        others += entries.others
    if OWN in others and not stamps:
        raise UserError(f"data.path: {root} is a {OWN}; give the folder that holds the images")
    return files, +others, stamps


class Entries(NamedTuple):
    """Entries of one folder: image files, folders and links to folders by their whole names, counts of others."""

    files: list[str]
    folders: list[str]
    links: list[str]
    others: Counter


def read_folder(root: Path, prefix: str, extensions: tuple[str, ...]) -> Entries | None:
    """Read one folder, None for one that maskwise wrote. Raises OSError."""
    found, marks = Entries([], [], [], Counter()), set()
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            name, kind = entry.name, kind_of(entry)
            ending = os.path.splitext(name)[1].lower()
            if name in OWN_NAMES:
                marks.add(name)
            if name.startswith("."):
                found.others[HIDDEN] += kind == FILE and ending in extensions and not name.startswith("._")
            elif kind == FOLDER and name not in SYSTEM_FOLDERS:
                (found.links if entry.is_symlink() else found.folders).append(f"{prefix}{name}/")
            elif kind == FILE and ending in extensions:
                found.files.append(prefix + name)
            elif kind != FOLDER:
                found.others[key_of(name) if kind == FILE else kind] += 1
    return None if is_own(marks) else found


def kind_of(entry: os.DirEntry) -> str:
    """Return whether an entry is a file or a folder, directly or by a link, or what else it is."""
    try:
        if entry.is_dir():
            return FOLDER
        if entry.is_file():
            return FILE
    except OSError:  # a link to itself
        pass
    return "broken link" if entry.is_symlink() else "pipe or device"


def cache_file(root: Path, extensions: tuple[str, ...]) -> Path | None:
    """Return the cache file for a folder; None where caching is off or there is no home folder."""
    home = cache_folder()
    if home is None:
        return None
    identity = f"{VERSION} {os.path.realpath(root)} {extensions}"
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return home / "index" / f"{key}.npz"


def load_cache(path: Path, root: Path) -> tuple[PackedStrings, Counter] | None:
    """Load a cached listing; None where it is missing or damaged or a folder has changed."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if any(os.stat(root / folder).st_mtime_ns != stamp for folder, stamp in about["stamps"].items()):
                return None
            return PackedStrings(arrays["blob"].tobytes(), arrays["ends"]), Counter(about["others"])
    except Exception:  # truncated or of another format: list the folder instead
        return None


def save_cache(path: Path, names: PackedStrings, others: Counter, stamps: dict[str, int]) -> None:
    """Cache a listing; an unwritable cache folder is ignored."""
    about = json.dumps({"stamps": stamps, "others": others}).encode()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(
                file, blob=np.frombuffer(names.blob, np.uint8), ends=names.ends, about=np.frombuffer(about, np.uint8)
            )
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)

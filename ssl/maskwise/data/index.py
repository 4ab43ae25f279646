"""Which image files lie below a folder; for large folders remembered until a folder changes."""

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np

from maskwise.data.names import Names
from maskwise.functional.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
REMEMBERED_FROM = 10_000  # files; smaller folders are read anew each time, in a fraction of a second
SETTLED = 2.0  # seconds a folder must have been at rest, or a change within its clock's tick could go unseen
VERSION = 1


def scan(root: Path, extensions: tuple[str, ...] = EXTENSIONS) -> tuple[Names, Counter]:
    """Image files below a folder, relative and sorted, and how many other files of each extension there are.

    Links to folders are followed, names that begin with a dot passed over. The answer for many files is kept in the
    user's cache folder (`MASKWISE_CACHE`, else `XDG_CACHE_HOME`, else ~/.cache; `MASKWISE_CACHE=none`: never) with
    the time stamps of all folders, and holds as long as no folder's changes. Raises UserError for unreadable folders.
    """
    place = cache_file(root, extensions)
    known = recall(place, root) if place else None
    if known is not None:
        return known
    asked = time.time()
    files, others, stamps = walk(root, extensions)
    names = Names.of(sorted(files))
    if place and len(names) >= REMEMBERED_FROM and max(stamps.values()) < (asked - SETTLED) * 1e9:
        remember(place, names, others, stamps)
    return names, others


def walk(root: Path, extensions: tuple[str, ...]) -> tuple[list[str], Counter, dict[str, int]]:
    """Relative image files, counts of other files by extension, and each folder's time stamp in nanoseconds."""
    files: list[str] = []
    others: Counter = Counter()
    stamps: dict[str, int] = {}
    waiting, seen = [""], set()
    while waiting:
        prefix = waiting.pop()
        try:
            about = os.stat(root / prefix)
            if (about.st_dev, about.st_ino) in seen:  # a link that leads back
                continue
            seen.add((about.st_dev, about.st_ino))
            stamps[prefix] = about.st_mtime_ns
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    extension = os.path.splitext(name)[1].lower()
                    if extension in extensions and not (entry.is_symlink() and entry.is_dir()) and entry.is_file():
                        files.append(prefix + name)
                    elif entry.is_dir():
                        waiting.append(f"{prefix}{name}/")
                    else:
                        others[extension or "no extension"] += 1
        except OSError as error:
            raise UserError(f"data.path: cannot read {error.filename}: {error.strerror}") from None
    return files, others, stamps


def cache_file(root: Path, extensions: tuple[str, ...]) -> Path | None:
    """Where the index of a folder is kept, None where none is wanted."""
    chosen = os.environ.get("MASKWISE_CACHE")
    if chosen == "none":
        return None
    if chosen:
        home = Path(chosen)
    else:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskwise"
        except RuntimeError:  # no home
            return None
    key = hashlib.sha256(f"{VERSION} {os.path.realpath(root)} {extensions}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return home / "index" / f"{key}.npz"


def recall(place: Path, root: Path) -> tuple[Names, Counter] | None:
    """The remembered index if every folder still bears its time stamp; None for whatever reason it does not serve."""
    if not place.is_file():
        return None
    try:
        with np.load(place, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if any(os.stat(root / folder).st_mtime_ns != stamp for folder, stamp in about["stamps"].items()):
                return None
            return Names(kept["blob"].tobytes(), kept["ends"]), Counter(about["others"])
    except Exception:  # a file cut short or of another shape: the folder itself is asked
        return None


def remember(place: Path, names: Names, others: Counter, stamps: dict[str, int]) -> None:
    """Keep an index; a cache that cannot be written is done without."""
    about = json.dumps({"stamps": stamps, "others": others}).encode()
    aside = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.savez(file, blob=np.frombuffer(names.blob, np.uint8), ends=names.ends, about=np.frombuffer(about, np.uint8))
        os.replace(aside, place)
    except OSError:
        aside.unlink(missing_ok=True)

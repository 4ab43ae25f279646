"""Files beside the images of a set: which of them are worth a line at the start, and that line."""

import os
from collections import Counter
from collections.abc import Iterable

from maskwise.data.decoding import multichannel
from maskwise.imaging.formats import FORMATS, endings

# written by systems and tools: thumbnails, trash, resource forks of macOS
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
FILE, FOLDER = "file", "folder"
HIDDEN, REPEATED = "hidden image (its name begins with a dot)", "link to a folder that is listed already"
OWN = "folder of a run, an export or evaluations"
# names that tell a folder which maskwise wrote, whose pictures are no data: one of each group
OWN_FILES = (
    ({"recipe.yaml"}, {"run.json", "checkpoints"}),
    ({"config.json"}, {"README.md"}, {"model.safetensors", "backbone.safetensors"}),
    ({"table.md"}, {"reports"}, {"features", "tensorboard"}),
    ({"mlflow.db"}, {"artifacts", ".lock"}),
)
OWN_NAMES = {name for groups in OWN_FILES for group in groups for name in group}
KINDS = 8  # that one line names
NO_ENDING = "no extension"
TEXTS = {".txt", ".md", ".rst", ".rtf", ".pdf", ".doc", ".docx", ".html", ".htm", ".css", ".tex", ".bib", ".log"}
TABLES = {".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xls", ".xlsx", ".lst"}
CODE = {".py", ".pyc", ".ipynb", ".sh", ".bat", ".js", ".m", ".r"}
RECORDS = {".cls", ".db", ".sqlite", ".md5", ".sha1", ".sha256", ".asc", ".sig", ".lnk", ".url", ".lock", ".license"}
MODELS = {".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".pkl"}
FILMS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav"}
NAMES = {"readme", "license", "copying", "notice", "manifest", "version", "checksums", "md5sums", "sha256sums"}
NO_IMAGES = TEXTS | TABLES | CODE | RECORDS | MODELS | FILMS | NAMES  # for certain; archives and arrays may hold images
ARCHIVES = {".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst"}


def key_of(name: str) -> str:
    """Return the key under which a file is counted: its ending in lower case, or that it has none."""
    stem, ending = os.path.splitext(name)
    return ending.lower() or (stem.lower() if stem.lower() in NAMES else NO_ENDING)


def is_own(names: set[str]) -> bool:
    """Return whether a folder with these entries was written by maskwise."""
    return any(all(group & names for group in groups) for groups in OWN_FILES)


def is_system(path: str) -> bool:
    """Return whether a path of a tar file leads through a hidden or system folder, or is hidden itself."""
    return any(part in SYSTEM_FOLDERS or (part.startswith(".") and part != ".") for part in path.split("/"))


def left_out(place, used: int, others: Counter) -> list[str]:
    """Describe what beside `used` images was left out, in one line; [] where that is no image for certain.

    others: counts by ending in lower case or by a kind in words.
    """
    worth = sorted((-count, key) for key, count in others.items() if key not in NO_IMAGES)
    if not worth:
        return []
    total, shown = -sum(count for count, _ in worth), worth[:KINDS]
    counts = ", ".join(f"{-count} {key}" for count, key in shown)
    more = f" and {len(worth) - KINDS} more kinds" if len(worth) > KINDS else ""
    remedies = "; ".join(remedies_of(key for _, key in worth))
    text = f"{total} of {used + total} files in {place} are left out: {counts}{more}"
    return [f"{text} ({remedies})" if remedies else text]


def remedies_of(others: Iterable[str]) -> list[str]:
    """List what makes files of these endings readable, each remedy once."""
    return list(dict.fromkeys(filter(None, map(remedy, others))))


def remedy(key: str) -> str | None:
    """Return what makes files of an ending readable, None where nothing here does."""
    if key in FORMATS["HEIF"]:
        return "pip install pillow-heif to read HEIC"
    if key in multichannel.ARRAYS:
        return "arrays are read with data.bits=16, or where data.mean has other than three numbers"
    if any(key in known for known in FORMATS.values()):
        return f"this build of Pillow lacks the decoder of {key}"
    if key in ARCHIVES:
        return "unpack archives"
    return None


def image_endings(channels: int = 3, bits: int = 8) -> tuple[str, ...]:
    """Return the endings of the images of a set; arrays count where the images are not 8-bit RGB."""
    return endings() + (multichannel.ARRAYS if (channels, bits) != (3, 8) else ())

"""In-Shop Clothes Retrieval (DeepFashion): queries and a gallery of the same items."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.benchmark_sets.listed_files import ListedFiles, find_root, read_table, require_files
from maskwise.errors import UserError

LIST = "Eval/list_eval_partition.txt"


def matches(folder: Path) -> bool:
    """Return whether a folder has the partition list."""
    return (_root(folder) / LIST).is_file()


def read(folder) -> dict:
    """Read `Img/` and `Eval/list_eval_partition.txt` -> {"test": queries, "gallery"}.

    The list has two header lines, then name, item, train|query|gallery. Names are relative to Img (`img/...`) or to the
    folder itself. Raises UserError for missing files.
    """
    root = require_files("In-Shop", _root(folder), LIST)
    table = read_table("In-Shop", root / LIST, 3, skip=2)
    images = root / "Img" if (root / "Img").is_dir() else root
    items = {item: label for label, item in enumerate(sorted({words[1] for words in table}))}
    parts = {part: [words for words in table if words[2] == part] for part in ("query", "gallery")}
    empty = next((part for part, lines in parts.items() if not lines), None)
    if empty:
        raise UserError(f"In-Shop: {root / LIST} names no {empty} images; give the file as published")
    return {
        role: ListedFiles(
            "In-Shop", images, [words[0] for words in parts[part]], [items[words[1]] for words in parts[part]]
        )
        for role, part in (("test", "query"), ("gallery", "gallery"))
    }


def _root(folder: Path) -> Path:
    return find_root(folder, "In-shop Clothes Retrieval Benchmark", "inshop", "In-shop")

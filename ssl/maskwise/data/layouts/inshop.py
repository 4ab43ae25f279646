"""In-Shop Clothes Retrieval (DeepFashion): queries against a gallery of the same items."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.layouts.files import Files, below, need, rows
from maskwise.functional.errors import UserError

LIST = "Eval/list_eval_partition.txt"


def holds(folder: Path) -> bool:
    """Whether a folder has the partition."""
    return (_root(folder) / LIST).is_file()


def read(folder) -> dict:
    """`Img/`, `Eval/list_eval_partition.txt` (two header lines, then name, item, train|query|gallery) -> {"test": queries, "gallery"}.

    Names are relative to Img (`img/...`) or to the folder itself. Raises UserError for what is missing.
    """
    root = need("In-Shop", _root(folder), LIST)
    table = rows("In-Shop", root / LIST, 3, skip=2)
    pictures = root / "Img" if (root / "Img").is_dir() else root
    items = {item: number for number, item in enumerate(sorted({words[1] for words in table}))}
    parts = {part: [words for words in table if words[2] == part] for part in ("query", "gallery")}
    empty = next((part for part, some in parts.items() if not some), None)
    if empty:
        raise UserError(f"In-Shop: {root / LIST} names no {empty} images; give the file as published")
    return {
        role: Files("In-Shop", pictures, [words[0] for words in parts[part]], [items[words[1]] for words in parts[part]])
        for role, part in (("test", "query"), ("gallery", "gallery"))
    }


def _root(folder: Path) -> Path:
    return below(folder, "In-shop Clothes Retrieval Benchmark", "inshop", "In-shop")

"""Stanford Online Products: 120,053 images of 22,634 products."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.benchmark_sets.listed_files import ListedFiles, find_root, parse_int, read_table, require_files


def matches(folder: Path) -> bool:
    """Return whether a folder, or its Stanford_Online_Products, has the test list."""
    return (find_root(folder, "Stanford_Online_Products") / "Ebay_test.txt").is_file()


def read(folder, part: str = "test") -> dict:
    """Read `Ebay_{train,test}.txt` -> {"test"}, or {"train", "test"} with part="split".

    The lists have a header, then image, class, super-class, path. Raises UserError for missing files.
    """
    roles = ("train", "test") if part == "split" else ("test",)
    lists = [f"Ebay_{role}.txt" for role in reversed(roles)]
    root = require_files("SOP", find_root(folder, "Stanford_Online_Products"), *lists)
    data = {}
    for role in roles:
        path = root / f"Ebay_{role}.txt"
        table = read_table("SOP", path, 4, skip=1)
        data[role] = ListedFiles(
            "SOP", root, [words[3] for words in table], [parse_int("SOP", path, words[1]) - 1 for words in table]
        )
    return data

"""Stanford Online Products: 120,053 images of 22,634 products."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.layouts.files import Files, below, need, number, rows


def holds(folder: Path) -> bool:
    """Whether a folder, or its Stanford_Online_Products, has the test list."""
    return (below(folder, "Stanford_Online_Products") / "Ebay_test.txt").is_file()


def read(folder, part: str = "test") -> dict:
    """`Ebay_{train,test}.txt` (a header, then image, class, super-class, path) -> {"test"}, or {"train", "test"} with part="split".

    Raises UserError for what is missing.
    """
    root = need("SOP", below(folder, "Stanford_Online_Products"), "Ebay_test.txt", *(["Ebay_train.txt"] if part == "split" else []))
    found = {}
    for role in ("train", "test") if part == "split" else ("test",):
        path = root / f"Ebay_{role}.txt"
        table = rows("SOP", path, 4, skip=1)
        found[role] = Files("SOP", root, [words[3] for words in table], [number("SOP", path, words[1]) - 1 for words in table])
    return found

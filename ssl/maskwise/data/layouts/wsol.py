"""Weakly supervised localisation lists: image_ids, class_labels, image_sizes and localization of a split."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwise.data.layouts.files import Boxed, below, need
from maskwise.functional.errors import UserError

LISTS = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


def holds(folder: Path) -> bool:
    """Whether a folder, or its `wsol`, has a test split of lists."""
    return (below(folder, "wsol") / "test" / LISTS[0]).is_file()


def read(folder, images=None) -> dict:
    """`wsol/{fullsup,test}/*.txt` -> {part: images} with labels, `.boxes(i)` (float [n, 4], original pixels) and `.sizes` (w, h).

    images: the folder that ids are relative to, by default the given one. An id may have several box lines. Raises UserError for
    what is missing.
    """
    folder = Path(folder).expanduser()
    root, found = below(folder, "wsol"), {}
    for part in (name for name in ("fullsup", "test") if (root / name).is_dir()):
        need("WSOL", root / part, *LISTS)
        ids, labels, sizes, sides = (_table(root / part / name, width) for name, width in zip(LISTS, (1, 2, 3, 5)))
        names = [words[0] for words in ids]
        table = {words[0]: int(words[1]) for words in labels}
        size = {words[0]: (int(words[1]), int(words[2])) for words in sizes}
        boxes: dict[str, list] = {name: [] for name in names}
        for name, *box in sides:
            if name in boxes:
                boxes[name].append([float(side) for side in box])
        lacking = next((name for name in names if name not in table or name not in size or not boxes[name]), None)
        if lacking:
            raise UserError(f"WSOL: {root / part} has no label, size or box for {lacking}; give the four lists of one release")
        data = Boxed("WSOL", Path(images) if images else folder, names, [table[name] for name in names], boxes=[torch.tensor(boxes[name]) for name in names])
        data.sizes = [size[name] for name in names]
        found[part] = data
    if not found:
        raise UserError(f"WSOL: {root} lacks test and fullsup; each should hold {', '.join(LISTS)}")
    return found


def _table(path: Path, columns: int) -> list[list[str]]:
    table = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, words in enumerate(table):
        if len(words) != columns or any(not _numeric(word) for word in words[1:]):
            raise UserError(f"WSOL: {path}, line {number + 1}: not {columns} columns of an id and numbers; give the list as published")
    return table


def _numeric(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True

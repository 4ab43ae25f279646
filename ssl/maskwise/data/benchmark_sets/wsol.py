"""Weakly supervised localization (Choe et al. 2020): lists of image ids, labels, sizes and boxes per split."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwise.data.benchmark_sets.listed_files import BoxedFiles, find_root, require_files
from maskwise.errors import UserError

LISTS = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


class SizedImages(BoxedFiles):
    """Images with boxes, whose maxima are pixels of the object, and their original sizes (width, height)."""

    inclusive = True

    def __init__(self, *listed, boxes, sizes: list[tuple[int, int]]):
        super().__init__(*listed, boxes=boxes)
        self.sizes = sizes

    def box_size(self, index: int) -> tuple[int, int]:
        """Return the size (width, height) that the boxes of one image refer to."""
        return self.sizes[index]


def matches(folder: Path) -> bool:
    """Return whether a folder, or its `wsol`, has a test split of lists."""
    return (find_root(folder, "wsol") / "test" / LISTS[0]).is_file()


def read(folder, images=None) -> dict:
    """Read `wsol/{fullsup,test}/*.txt` -> {part: images} with labels, `.boxes(i)` and `.sizes` (width, height).

    Boxes are float [n, 4] in original pixels, ends included; an id may have several box lines. images: the base folder
    of the ids, by default the given one; ids of ImageNet (`val/ILSVRC2012_val_00000001.JPEG`) may lie in class folders.
    Raises UserError for missing files.
    """
    folder = Path(folder).expanduser()
    root, data = find_root(folder, "wsol"), {}
    base = Path(images).expanduser() if images else folder
    for part in (name for name in ("fullsup", "test") if (root / name).is_dir()):
        require_files("WSOL", root / part, *LISTS)
        ids, labels, sizes, sides = (_table(root / part / name, width) for name, width in zip(LISTS, (1, 2, 3, 5)))
        names = [words[0] for words in ids]
        label = {words[0]: int(words[1]) for words in labels}
        size = {words[0]: (int(words[1]), int(words[2])) for words in sizes}
        boxes: dict[str, list] = {name: [] for name in names}
        for name, *box in sides:
            if name in boxes:
                boxes[name].append([float(side) for side in box])
        missing = next((name for name in names if name not in label or name not in size or not boxes[name]), None)
        if missing:
            raise UserError(
                f"WSOL: {root / part} has no label, size or box for {missing}; give the four lists of one release"
            )
        data[part] = SizedImages(
            "WSOL",
            base,
            located(base, names),
            [label[name] for name in names],
            boxes=[torch.tensor(boxes[name]) for name in names],
            sizes=[size[name] for name in names],
        )
    if not data:
        raise UserError(f"WSOL: {root} lacks test and fullsup; each should have {', '.join(LISTS)}")
    return data


def located(base: Path, names: list[str]) -> list[str]:
    """Return the files of ids relative to a folder, those that are missing there from its class folders."""
    files, inside = list(names), {}
    for i, name in enumerate(names):
        path = base / name
        if not path.is_file():
            if path.parent not in inside:
                inside[path.parent] = {file.name: file for file in path.parent.glob("*/*")}
            found = inside[path.parent].get(path.name)
            files[i] = name if found is None else str(found.relative_to(base))
    return files


def _table(path: Path, columns: int) -> list[list[str]]:
    table = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, words in enumerate(table):
        if len(words) != columns or any(not _numeric(word) for word in words[1:]):
            raise UserError(
                f"WSOL: {path}, line {number + 1}: not {columns} columns of an id and numbers; "
                "give the list as published"
            )
    return table


def _numeric(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True

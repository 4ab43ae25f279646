"""INRIA Copydays: holiday photographs and copies made of them; images of one block share the first four digits of their name."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.datasets import scan
from maskwise.data.layouts.files import Files, need
from maskwise.functional.errors import UserError

GROUPS = ("strong", "jpegqual", "crops")


def holds(folder: Path) -> bool:
    """Whether a folder has originals and at least one group of copies."""
    return (folder / "original").is_dir() and any((folder / group).is_dir() for group in GROUPS)


def read(folder, distractors=None, whitening=None) -> dict:
    """`original/*.jpg`, `strong/*.jpg`, `jpegqual/<q>/*.jpg`, `crops/<q>/*.jpg` -> {"database", "copies": {group: Files}}.

    Labels are the blocks, in the originals' order. distractors, whitening: folders of other images (any depth) that join the
    database, or from which the whitening is learnt. Raises UserError for missing originals and for copies of none of them.
    """
    root = need("copydays", Path(folder).expanduser(), "original")
    originals = scan(root / "original")[0]
    blocks = {block(name): number for number, name in enumerate(originals)}
    data = {"database": Files("copydays", root / "original", originals, list(range(len(originals)))), "copies": {}}
    if len(blocks) < len(originals):
        raise UserError(f"copydays: two originals in {root / 'original'} share their first four characters; give the files as published")
    for group in (name for name in GROUPS if (root / name).is_dir()):
        for inner in sorted({str(Path(name).parent) for name in scan(root / group)[0]}):
            place = root / group / inner
            files = [entry for entry in scan(place)[0] if "/" not in entry]
            strangers = [name for name in files if block(name) not in blocks]
            if strangers:
                raise UserError(f"copydays: {place / strangers[0]} is a copy of no original; give the files as published")
            name = group if inner == "." else f"{group}/{inner}"
            data["copies"][name] = Files("copydays", place, files, [blocks[block(name)] for name in files])
    if not data["copies"]:
        raise UserError(f"copydays: {root} lacks copies; it should hold at least one of {', '.join(GROUPS)}")
    for role, extra in (("distractors", distractors), ("whitening", whitening)):
        if extra is not None:
            place = need("copydays", Path(extra).expanduser())
            data[role] = Files("copydays", place, scan(place)[0])
    return data


def block(name: str) -> str:
    """The part of a file name that a photograph and its copies share."""
    return Path(name).name[:4]

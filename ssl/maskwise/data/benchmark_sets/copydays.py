"""INRIA Copydays: photographs and edited copies; images of one block share the first four digits of their name."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.benchmark_sets.listed_files import ListedFiles, require_files
from maskwise.data.datasets.folder_index import scan
from maskwise.errors import UserError
from maskwise.imaging.formats import endings

GROUPS = ("strong", "jpegqual", "crops")


def matches(folder: Path) -> bool:
    """Return whether a folder has originals and at least one group of copies."""
    return (folder / "original").is_dir() and any((folder / group).is_dir() for group in GROUPS)


def read(folder, distractors=None, whitening=None) -> dict:
    """Read originals and copies -> {"database", "copies": {group: ListedFiles}}.

    Layout: `original/*.jpg`, `strong/*.jpg`, `jpegqual/<q>/*.jpg`, `crops/<q>/*.jpg`. Labels are the blocks, in the
    originals' order. distractors, whitening: folders of other images (any depth), added to the database or used to fit
    the whitening. Raises UserError for missing originals and for copies without an original.
    """
    root = require_files("copydays", Path(folder).expanduser(), "original")
    originals = scan(root / "original", endings())[0]
    blocks = {block_of(name): label for label, name in enumerate(originals)}
    data = {
        "database": ListedFiles("copydays", root / "original", originals, list(range(len(originals)))),
        "copies": {},
    }
    if len(blocks) < len(originals):
        raise UserError(
            f"copydays: two originals in {root / 'original'} share their first four characters; "
            "give the files as published"
        )
    for group in (name for name in GROUPS if (root / name).is_dir()):
        for inner in sorted({str(Path(name).parent) for name in scan(root / group, endings())[0]}):
            copies = root / group / inner
            files = [entry for entry in scan(copies, endings())[0] if "/" not in entry]
            unknown = [name for name in files if block_of(name) not in blocks]
            if unknown:
                raise UserError(
                    f"copydays: {copies / unknown[0]} is a copy of no original; give the files as published"
                )
            name = group if inner == "." else f"{group}/{inner}"
            data["copies"][name] = ListedFiles("copydays", copies, files, [blocks[block_of(name)] for name in files])
    if not data["copies"]:
        raise UserError(f"copydays: {root} lacks copies; it should have at least one of {', '.join(GROUPS)}")
    for role, extra in (("distractors", distractors), ("whitening", whitening)):
        if extra is not None:
            extra = require_files("copydays", Path(extra).expanduser())
            data[role] = ListedFiles("copydays", extra, scan(extra, endings())[0])
    return data


def block_of(name: str) -> str:
    """Return the part of a file name that an original and its copies share."""
    return Path(name).name[:4]

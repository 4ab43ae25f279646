"""Revisited Oxford and Paris: database, queries, and the easy, hard and junk images of each query."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from maskwise.data.benchmark_sets.listed_files import UnrotatedFiles, find_root, require_files
from maskwise.data.benchmark_sets.safe_pickle import read_pickle
from maskwise.errors import UserError

NAMES = ("roxford5k", "rparis6k")
KEYS = ("imlist", "qimlist", "gnd")


def matches(folder: Path) -> bool:
    """Return whether a folder is one of the two sets, has one, or has a gnd.json of the same format."""
    return any(_ground_truth(root) is not None for root in (folder, *(folder / name for name in NAMES)))


def read(folder, name: str | None = None) -> dict:
    """Read `<name>/jpg/*.jpg` and `gnd_<name>.pkl` -> {"query", "database", "ground_truth"}.

    Images are UnrotatedFiles, the ground truth a list of {bbx, easy, hard, junk}. The pickle is read as plain data
    only; `gnd.json` with the same keys, its names relative to the folder, is accepted too. name: roxford5k or rparis6k
    where the folder has both. Raises UserError for missing files.
    """
    root = find_root(folder, *([name] if name else NAMES))
    path = _ground_truth(root)
    if path is None:
        raise UserError(
            f"retrieval: {root} lacks gnd_<name>.pkl (or gnd.json); "
            "give the folder roxford5k or rparis6k, with jpg/ next to it"
        )
    table = _json(path) if path.suffix == ".json" else read_pickle(path, "retrieval")
    if not isinstance(table, dict) or any(key not in table for key in KEYS):
        raise UserError(f"retrieval: {path} must hold {', '.join(KEYS)}; give the file as published")
    images = require_files("retrieval", root, "jpg") / "jpg" if path.suffix == ".pkl" else root
    lists = {key: [_file_name(str(name), images) for name in table[key]] for key in ("imlist", "qimlist")}
    if len(table["gnd"]) != len(lists["qimlist"]):
        raise UserError(
            f"retrieval: {path} has {len(lists['qimlist'])} queries and ground truth for {len(table['gnd'])}; "
            "give the file as published"
        )
    truth = [_checked(entry, len(lists["imlist"]), path) for entry in table["gnd"]]
    return {
        "query": UnrotatedFiles("retrieval", images, lists["qimlist"]),
        "database": UnrotatedFiles("retrieval", images, lists["imlist"]),
        "ground_truth": truth,
    }


def _ground_truth(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    candidates = [folder / f"gnd_{folder.name}.pkl", *sorted(folder.glob("gnd_*.pkl")), folder / "gnd.json"]
    return next((path for path in candidates if path.is_file()), None)


def _file_name(name: str, folder: Path) -> str:
    return name if Path(name).suffix and (folder / name).is_file() else f"{name}.jpg"


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"retrieval: cannot read {path} ({error}); give JSON with {', '.join(KEYS)}") from None


def _checked(entry: dict, count: int, path: Path) -> dict:
    """Check the ground truth of one query: lists of database indices; `ok` of the old sets counts as easy."""
    try:
        lists = {
            key: [int(i) for i in entry.get(key, entry.get("ok", ()) if key == "easy" else ())]
            for key in ("easy", "hard", "junk")
        }
        box = [float(side) for side in entry["bbx"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"retrieval: {path}: a query's entry is not {{bbx, easy, hard, junk}}; give the file as published"
        ) from None
    indices = [i for part in lists.values() for i in part]
    if len(box) != 4 or any(not 0 <= i < count for i in indices):
        raise UserError(f"retrieval: {path} names images outside its list of {count}; give the file as published")
    return {"bbx": torch.tensor(box), **lists}

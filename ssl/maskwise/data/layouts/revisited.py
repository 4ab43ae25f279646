"""Revisited Oxford and Paris: database, queries and who is easy, hard or junk for whom."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from maskwise.data.layouts.files import Stored, below, need
from maskwise.data.layouts.pickles import read_pickle
from maskwise.functional.errors import UserError

NAMES = ("roxford5k", "rparis6k")
KEYS = ("imlist", "qimlist", "gnd")


def holds(folder: Path) -> bool:
    """Whether a folder is one of the two sets, holds one, or has a gnd.json of the same shape."""
    return any(_ground_truth(place) is not None for place in (folder, *(folder / name for name in NAMES)))


def read(folder, name: str | None = None) -> dict:
    """`<name>/jpg/*.jpg` and `gnd_<name>.pkl` -> {"query": Stored, "database": Stored, "ground_truth": [{bbx, easy, hard, junk}]}.

    The pickle is read as plain data only; `gnd.json` with the same keys, its names relative to the folder, is read too. name:
    roxford5k or rparis6k where the folder holds both. Raises UserError for what is missing, with one line.
    """
    root = below(folder, *([name] if name else NAMES))
    path = _ground_truth(root)
    if path is None:
        raise UserError(f"retrieval: {root} lacks gnd_<name>.pkl (or gnd.json); give the folder roxford5k or rparis6k, with jpg/ beside it")
    table = _json(path) if path.suffix == ".json" else read_pickle(path, "retrieval")
    if not isinstance(table, dict) or any(key not in table for key in KEYS):
        raise UserError(f"retrieval: {path} must hold {', '.join(KEYS)}; give the file as published")
    pictures = need("retrieval", root, "jpg") / "jpg" if path.suffix == ".pkl" else root
    lists = {key: [_named(str(each), pictures) for each in table[key]] for key in ("imlist", "qimlist")}
    if len(table["gnd"]) != len(lists["qimlist"]):
        raise UserError(f"retrieval: {path} has {len(lists['qimlist'])} queries and ground truth for {len(table['gnd'])}; give the file as published")
    truth = [_checked(entry, len(lists["imlist"]), path) for entry in table["gnd"]]
    return {"query": Stored("retrieval", pictures, lists["qimlist"]), "database": Stored("retrieval", pictures, lists["imlist"]), "ground_truth": truth}


def _ground_truth(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    found = [folder / f"gnd_{folder.name}.pkl", *sorted(folder.glob("gnd_*.pkl")), folder / "gnd.json"]
    return next((path for path in found if path.is_file()), None)


def _named(name: str, folder: Path) -> str:
    return name if Path(name).suffix and (folder / name).is_file() else f"{name}.jpg"


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"retrieval: cannot read {path} ({error}); give JSON with {', '.join(KEYS)}") from None


def _checked(entry: dict, count: int, path: Path) -> dict:
    """One query's ground truth as lists, its indices inside the database; `ok` of the old sets counts as easy."""
    try:
        lists = {key: [int(i) for i in entry.get(key, entry.get("ok", ()) if key == "easy" else ())] for key in ("easy", "hard", "junk")}
        box = [float(side) for side in entry["bbx"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"retrieval: {path}: a query's entry is not {{bbx, easy, hard, junk}}; give the file as published") from None
    every = [i for part in lists.values() for i in part]
    if len(box) != 4 or any(not 0 <= i < count for i in every):
        raise UserError(f"retrieval: {path} names images outside its list of {count}; give the file as published")
    return {"bbx": torch.tensor(box), **lists}

"""Weights files of a folder: which ones there are, and whether they hold the same network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats import transformers
from maskwise.export.formats.spec_checks import json_object
from maskwise.nn.backbones.weights_file import read_tensors

FILES = ("backbone.safetensors", "model.safetensors", "pytorch_model.bin")  # in the order in which they are preferred
RESEARCH_SUFFIXES = (".pth", ".pth.tar", ".pt", ".ckpt")  # of training files, which no config.json describes
INDEX = ".index.json"  # after a file's name: names the files that it is split into
NOT_COMPARED = ("head.", "head_dist.", "fc.", "classifier.", "pooler.", "mask_token", "fc_norm.")
TOLERANCE = 1e-6  # of tokens and positions, which one library adds and the other does not


@dataclass(frozen=True)
class FolderWeights:
    """Weights of a folder that agree: a source under timm's names, and one under transformers', None without one."""

    native: Path | None = None
    foreign: Path | None = None


def research_files(names: Iterable[str], title: str) -> list[str]:
    """Return the training files among a folder's files, or only the one that is named as the folder."""
    found = sorted(name for name in names if "/" not in name and name.endswith(RESEARCH_SUFFIXES))
    return [name for name in found if name in {title + suffix for suffix in RESEARCH_SUFFIXES}] or found


def agreeing(folder: Path) -> FolderWeights:
    """Find the weights of a folder; raises UserError, naming the files, if they hold different weights."""
    found: dict[str, Path] = {}
    first, reference = None, {}
    for source in sources(folder):
        tensors = read(source)
        found.setdefault("foreign" if transformers.is_foreign(tensors) else "native", source)
        own = comparable(tensors)
        if first is None:
            first, reference = source, own
        elif (key := difference(reference, own)) is not None:
            names = [" and ".join(file.name for file in parts(side)[:2]) for side in (first, source)]
            raise UserError(
                f"{folder}: {names[0]} and {names[1]} hold different weights ({key}): one was written after the other; "
                "remove the one that is out of date"
            )
    return FolderWeights(**found)


def sources(folder: Path) -> list[Path]:
    """Return the sources of weights in a folder; an index counts where the file that it stands for is missing.

    Where another source is complete, an index that names missing files is left out.
    """
    found = []
    for name in FILES:
        candidates = (folder / name, folder / f"{name}{INDEX}")
        found += [path for path in candidates if path.is_file()][:1]
    return [source for source in found if all(file.is_file() for file in parts(source))] or found


def files(folder: Path) -> list[Path]:
    """Return the weights files of a folder."""
    return [file for source in sources(folder) for file in parts(source)]


def parts(source: Path) -> list[Path]:
    """Return the files of a source, which is a weights file or an index of several."""
    if source.suffix != ".json":
        return [source]
    names = json_object(source).get("weight_map")
    names = dict.fromkeys(names.values()) if isinstance(names, dict) else {}
    return [source.parent / Path(str(name)).name for name in names]


def read(source: Path) -> dict[str, Tensor]:
    """Read all tensors of a source; raises UserError."""
    tensors: dict[str, Tensor] = {}
    for file in parts(source):
        tensors |= {key: value for key, value in read_tensors(file).items() if isinstance(value, Tensor)}
    return tensors


def comparable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors under one set of names, positions of the tokens added to them."""
    state = transformers.authors_keys(tensors)[0] if transformers.is_foreign(tensors) else dict(tensors)
    state = {key: value for key, value in state.items() if not key.startswith(NOT_COMPARED)}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    table = state.pop("pos_embed", None)
    if table is None or table.ndim != 3:
        return state if table is None else {**state, "pos_embed": table}
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    counts = (1 + registers, 1) if "cls_token" in state else (0,)
    prefix = next((count for count in counts if math.isqrt(table.shape[1] - count) ** 2 == table.shape[1] - count), 0)
    if prefix:
        state["cls_token"] = state["cls_token"] + table[:, :1]
    if prefix > 1:
        state["reg_token"] = state["reg_token"] + table[:, 1:prefix]
    return {**state, "pos_embed": table[:, prefix:]}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> str | None:
    """Return a key whose tensors differ, None for equal ones; missing layer scales are 1, biases and positions 0."""
    for key in sorted(first.keys() | second.keys()):
        one, other = first.get(key), second.get(key)
        if one is None or other is None:
            value = other if one is None else one
            neutral = torch.ones_like(value) if key.endswith(".gamma") else torch.zeros_like(value)
            if not key.endswith((".gamma", ".bias", "pos_embed")) or not torch.equal(value, neutral):
                return key
        elif one.shape != other.shape:
            return key
        elif key in ("cls_token", "reg_token"):
            if not torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE):
                return key
        elif not torch.equal(one, other):
            return key
    return None

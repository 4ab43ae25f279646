"""Pretrained weights from local files into a backbone's timm model: tensors only, every name accounted for."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from maskwise.functional.errors import UserError
from maskwise.functional.resample import position_table

CLASSIFIER = ("head.", "head_dist.", "attn_pool.", "pre_logits.", "fc_norm.")


def read_tensors(path: str | Path, allowed: list | None = None) -> dict:
    """The content of a weights file: safetensors, or torch's format with tensors and `allowed` classes only.

    Raises UserError for a missing or unreadable file and for one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path (files are local; nothing is downloaded)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(allowed or []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and OS errors alike: the file is of no use
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in first or "Unsupported" in str(error):
            asked = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)|GLOBAL ([\w.]+)", str(error))
            first = f"it holds more than tensors{f' ({asked[1] or asked[2]})' if asked else ''} and would run code on loading"
        raise UserError(f"cannot read weights from {path}: {first}; give a .safetensors file or a state dict saved by torch") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors: give a state dict")
    return content


def strip_prefixes(state: dict, prefixes: tuple[str, ...] = ("module.", "_orig_mod.", "backbone.")) -> dict:
    """State dict with wrappers' names taken off the front of its keys, however often they are there."""
    stripped = {}
    for key, value in state.items():
        while any(key.startswith(prefix) for prefix in prefixes):
            key = key.partition(".")[2]
        stripped[key] = value
    return stripped


def mismatch(missing, unexpected) -> str:
    """What a strict load found wrong, short enough for one line."""
    parts = []
    for what, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if keys:
            parts.append(f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))
    return " and ".join(parts)


def fit(own: dict, state: dict, refusal: str, keys_remedy: str = "", shapes_remedy: str = "") -> None:
    """Raises UserError, between the refusal and its remedy, where keys or shapes differ from a module's own."""
    wrong = mismatch(own.keys() - state.keys(), state.keys() - own.keys())
    if wrong:
        raise UserError(f"{refusal}: it {wrong}{keys_remedy}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(f"{refusal}: {key} is {list(value.shape)} there and {list(own[key].shape)} here{shapes_remedy}")


def fill(module, state: dict, *refusal: str) -> None:
    """Load strictly; raises UserError in one line as `fit` does."""
    fit(module.state_dict(), state, *refusal)
    module.load_state_dict(state)


def load_pretrained(model, translate, path: str | Path, table_prefix: int, table_grid: tuple[int, int]) -> None:
    """Load pretrained weights strictly; classifier layers are left out, the position table fits any grid.

    translate: timm's reader of foreign layouts for this class of models, (state dict, model) -> state dict.
    Raises UserError for a file that cannot be read or does not fit.
    """
    state = bare_state(path)
    native = "patch_embed.proj.weight" in state and "mask_token" not in state
    table = state.pop("pos_embed", None) if native else None
    state = translated(translate, state, model, path)
    if "norm.weight" not in state:
        state = {key.replace("fc_norm.", "norm.", 1) if key.startswith("fc_norm.") else key: value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER) and key not in ("mask_token", "dist_token")}
    if model.cls_token is None:
        state.pop("cls_token", None)
    if table is not None and model.pos_embed is not None:
        state["pos_embed"] = fit_table(table, table_prefix, table_grid, path)
    fill(model, state, f"{path} does not fit this backbone", "; check backbone.name, patch_size and class_token", "; check backbone.name")


def load_maps(model, translate, path: str | Path, classifier: tuple[str, ...]) -> None:
    """Load pretrained weights of a network of maps strictly, its classifier's layers (names that begin so) left out.

    Raises UserError for a file that cannot be read or does not fit.
    """
    state = translated(translate, bare_state(path), model, path)
    state = {key: value for key, value in state.items() if not key.startswith(classifier)}
    fill(model, state, f"{path} does not fit this backbone", "; check backbone.name", "; check backbone.name")


def bare_state(path: str | Path) -> dict:
    """The state dict of a weights file, wrappers' names taken off its keys; raises UserError."""
    content = read_tensors(path)
    state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    return {key: value for key, value in strip_prefixes(state).items() if isinstance(value, Tensor)}


def translated(translate, state: dict, model, path: str | Path) -> dict:
    """A foreign layout under timm's names; raises UserError where timm does not know it."""
    try:
        return translate(state, model)
    except Exception as error:  # timm guesses foreign layouts by their keys
        raise UserError(f"cannot read weights from {path}: timm does not know this layout ({type(error).__name__}: {error})") from None


def fit_table(table: Tensor, prefix: int, grid: tuple[int, int], path: str | Path) -> Tensor:
    """A stored position table [1, P' + h'*w', D] as [1, prefix + h*w, D]: surplus prefix rows dropped, resampled by size."""
    rows_there = table.shape[1]
    if rows_there == prefix + grid[0] * grid[1]:
        return table
    for there in (prefix, 1, 0):
        side = math.isqrt(max(0, rows_there - there))
        if side * side == rows_there - there and there >= prefix:
            patches = position_table(table[:, there:], (side, side), grid, "size")
            return torch.cat([table[:, :prefix], patches], dim=1)
    raise UserError(f"{path}: a position table of {rows_there} rows does not fit {prefix} prefix tokens and a square grid")

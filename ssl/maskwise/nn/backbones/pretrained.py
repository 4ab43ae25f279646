"""Pretrained weights from local files: tensors only, every key accounted for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn.backbones.families.base import FeatureMapFamily, TransformerFamily
from maskwise.nn.backbones.families.generic import GenericFamily
from maskwise.nn.backbones.weights_file import read_tensors

STATE_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")  # of a training file, averaged weights first
OUTER_WRAPPERS = ("module", "backbone")
INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
HEAD_PREFIXES = ("head.", "head_dist.", "aux_head.", "fc.", "classifier.")  # of timm models of any class
CLASSIFIER_PREFIXES = ("head.", "head_dist.", "attn_pool.", "pre_logits.", "fc_norm.")


@dataclass
class StateDict:
    """The tensors of one network under the names in its file; `unused` lists the keys that loading left out."""

    origin: str
    tensors: dict[str, Tensor]
    unused: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Return a line on the keys that were used and left out."""
        more = f" and {len(self.unused) - 3} more" if len(self.unused) > 3 else ""
        unused = ", ".join(self.unused[:3]) + more or "none"
        return f"weights {self.origin}: {len(self.tensors) - len(self.unused)} tensors matched; unused: {unused}"


def strip_prefixes(state: dict, outer: tuple[str, ...] = OUTER_WRAPPERS) -> dict:
    """Strip the names of wrappers from the keys of a state dict.

    The front of a key loses the `outer` names, repeatedly; torch.compile's and FSDP's names go wherever they stand.
    Raises UserError where two keys become one.
    """
    stripped = {}
    for key, value in state.items():
        parts = [part for part in str(key).split(".") if part not in INNER_WRAPPERS]
        while len(parts) > 1 and parts[0] in outer:
            del parts[0]
        name = ".".join(parts)
        if name in stripped:
            raise UserError(f"two keys are {name} without the names of wrappers, one of them {key}: give one network")
        stripped[name] = value
    return stripped


def mismatch_text(missing, unexpected) -> str:
    """Describe missing and unexpected keys, short enough for one line; empty if there are none."""
    parts = []
    for verb, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if keys:
            parts.append(f"{verb} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))
    return " and ".join(parts)


def check_state(own: dict, state: dict, refusal: str, keys_remedy: str = "", shapes_remedy: str = "") -> None:
    """Raise UserError where the keys or shapes of a state dict differ from a module's own.

    The message starts with `refusal` and ends with the remedy for keys or for shapes.
    """
    mismatch = mismatch_text(own.keys() - state.keys(), state.keys() - own.keys())
    if mismatch:
        raise UserError(f"{refusal}: it {mismatch}{keys_remedy}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{refusal}: {key} is {list(value.shape)} there and {list(own[key].shape)} here{shapes_remedy}"
            )


def load_transformer(
    model: nn.Module, family: TransformerFamily, file: StateDict, table_prefix: int, table_grid: tuple[int, int]
) -> None:
    """Load pretrained weights strictly; classifier layers are left out, the position table is resized to the grid.

    Raises UserError for weights that do not fit.
    """
    state = dict(file.tensors)
    native = any(key.startswith("patch_embed.") for key in state) and "mask_token" not in state
    table = state.pop("pos_embed", None) if native else None
    state = to_timm_keys(family, state, model, file.origin)
    if "norm.weight" not in state:
        state = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in state.items()}
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(CLASSIFIER_PREFIXES) and key not in ("mask_token", "dist_token")
    }
    if model.cls_token is None:
        state.pop("cls_token", None)
    if table is not None and model.pos_embed is not None:
        state["pos_embed"] = resize_table(table, table_prefix, table_grid, file.origin)
    load_strictly(model, state, file, "; check backbone.name, patch_size and class_token")


def load_feature_maps(model: nn.Module, family: FeatureMapFamily, file: StateDict) -> None:
    """Load pretrained weights of a network of feature maps strictly; classifier layers are left out.

    Raises UserError for weights that do not fit.
    """
    state = to_timm_keys(family, file.tensors, model, file.origin)
    state = {key: value for key, value in state.items() if not key.startswith(family.classifier_prefixes)}
    load_strictly(model, state, file, "; check backbone.name")


def load_generic(model: nn.Module, family: GenericFamily, file: StateDict) -> None:
    """Load pretrained weights of a whole timm model strictly; classifier layers are left out.

    Raises UserError for weights that do not fit.
    """
    state, own = to_timm_keys(family, file.tensors, model, file.origin), model.state_dict()
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    layers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads = (*(f"{layer}." for layer in layers), *HEAD_PREFIXES)
    state = {key: value for key, value in state.items() if key in own or not key.startswith(heads)}
    load_strictly(model, state, file, "; check backbone.name")


def load_strictly(model: nn.Module, state: dict, file: StateDict, keys_remedy: str) -> None:
    """Load a state dict strictly and list the file's unused keys; raises UserError where it does not fit."""
    check_state(
        model.state_dict(), state, f"{file.origin} does not fit this backbone", keys_remedy, "; check backbone.name"
    )
    model.load_state_dict(state)
    storages = {value.untyped_storage().data_ptr() for value in state.values()}
    file.unused = [
        key
        for key, value in file.tensors.items()
        if key not in state and value.untyped_storage().data_ptr() not in storages
    ]


def read_state_dict(path: str | Path) -> StateDict:
    """Read one network from a weights file, its averaged copy if it has one; raises UserError."""
    content = read_tensors(path)
    state = next((content[key] for key in STATE_ENTRIES if isinstance(content.get(key), dict)), content)
    tensors = {key: value for key, value in strip_prefixes(state).items() if isinstance(value, Tensor)}
    return StateDict(str(path), tensors)


def to_timm_keys(family, state: dict, model: nn.Module, path: str | Path) -> dict:
    """Rename a state dict to timm's keys; raises UserError for a layout unknown to timm."""
    try:
        return family.translate(state, model)
    except Exception as error:  # timm guesses foreign layouts by their keys
        raise UserError(
            f"cannot read weights from {path}: timm does not know this layout ({type(error).__name__}: {error})"
        ) from None


def resize_table(table: Tensor, prefix: int, grid: tuple[int, int], path: str | Path) -> Tensor:
    """Resize a stored position table [1, P' + h'*w', D] to [1, prefix + h*w, D].

    Surplus prefix rows are dropped; the square stored grid is resampled with mode "size".
    """
    rows = table.shape[1]
    if rows == prefix + grid[0] * grid[1]:
        return table
    for stored_prefix in (prefix, 1, 0):
        side = math.isqrt(max(0, rows - stored_prefix))
        if side * side == rows - stored_prefix and stored_prefix >= prefix:
            patches = position_table(table[:, stored_prefix:], (side, side), grid, "size")
            return torch.cat([table[:, :prefix], patches], dim=1)
    raise UserError(f"{path}: a position table of {rows} rows does not fit {prefix} prefix tokens and a square grid")

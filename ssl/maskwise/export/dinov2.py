"""DINOv2's backbones, with and without registers: their file's names and ours."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from maskwise.export import legacy
from maskwise.export.source import Source
from maskwise.functional.errors import UserError

LAYOUT = "dinov2"
NAMES = {384: "vit_small_patch14", 768: "vit_base_patch14", 1024: "vit_large_patch14", 1536: "vit_giant_patch14"}
HEADS = ("dino_head.", "ibot_head.", "gram_")


def recognised(content: dict) -> bool:
    """Whether a file's keys speak of DINOv2: a mask token under its name beside layer scales, or registers."""
    return any(keys & {"mask_token", "register_tokens"} and any(key.endswith("ls1.gamma") for key in keys) for keys in _key_sets(content))


def read(content: dict, path: Path, overrides: dict) -> Source:
    """What a DINOv2 file holds, of its backbone; registers move out from under the position table as in timm.

    There the class token's own position is added into the token, so that features are equal. Raises UserError for other keys.
    """
    states, unused = legacy.states_of(content, path)
    states = {role: legacy.aliased(state, overrides.get("alias", ()), path) for role, state in states.items()}
    for role, state in states.items():
        legacy.group(unused, "projection heads (DINOv2's trunks are not ours)", legacy.take(state, lambda key: key.startswith(HEADS)), role)
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
            raise UserError(f"{path} lacks cls_token, pos_embed or patch_embed.proj.weight: it is no dinov2 file; it has {', '.join(list(state)[:3]) or 'nothing'}")
    spec = spec_of(next(iter(states.values())), overrides, path)
    networks = {role: encoder_keys(state) for role, state in states.items()}
    return Source(str(path), LAYOUT, spec, networks, unused=unused, file=path, headless="DINOv2's heads are built otherwise than ours")


def spec_of(state: dict[str, Tensor], overrides: dict, path: Path) -> dict:
    """The spec of an encoder of these shapes; the model of that width in timm's list gives the name."""
    patch, rows = state["patch_embed.proj.weight"], state["pos_embed"].shape[1] - 1
    dim, side = patch.shape[0], math.isqrt(rows)
    if side * side != rows:
        raise UserError(f"{path}: its position table of {rows + 1} rows is of no square grid; this layout is not known")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    gated = any(".mlp.w12." in key for key in state)
    width = next(value.shape[0] for key, value in state.items() if re.search(r"mlp\.(w12|fc1)\.weight$", key))
    heads = overrides.get("num_heads", max(1, dim // 64))
    if dim % heads:
        raise UserError(f"num_heads={heads} does not divide the width {dim} of {path}: give num_heads=...")
    name = NAMES[1536] if gated else NAMES.get(dim, NAMES[384])
    backbone = {
        "name": f"{name}_{'reg4_' if registers else ''}dinov2",
        "image_size": [side * each for each in patch.shape[2:]],
        "patch_size": list(patch.shape[2:]),
        "class_token": True,
        "position": "size" if registers else "offset",
        "embed_dim": dim,
        "depth": len({_block(key) for key in state if key.startswith("blocks.")}),
        "num_heads": heads,
        "mlp_ratio": width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim,
        "init_values": 1.0 if any(key.endswith("ls1.gamma") for key in state) else None,
        **({"reg_tokens": registers, "no_embed_class": True} if registers else {}),
    }
    colours = legacy.COLOURS
    return {"backbone": backbone, "pooling": {"name": "cls", "dim": dim}, "norm": "after", "image_size": backbone["image_size"], "crop_pct": 0.875, **colours}


def encoder_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names -> names of an Encoder."""
    state = dict(state)
    if "register_tokens" in state:
        table = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = table[:, 1:].clone()
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed


def write(source: Source, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """DINOv2's flat state dict of one network, and what is left out.

    Missing layer scales are written as ones and a missing mask token as zeros, which change no feature; with registers the
    class token keeps its position and the table's first row is zero. Raises UserError for what DINOv2 has no place for.
    """
    role = source.role(weights or "teacher")
    state = {key.removeprefix("backbone."): value.clone() for key, value in source.networks[role].items()}
    strange = [key for key in state if key.startswith(("pooling.", "norm_pre.", "rope")) or "_norm." in key or "gamma_" in key]
    if strange or "cls_token" not in state or "pos_embed" not in state:
        raise UserError(f"{source.origin} has {strange[0] if strange else 'no class token'}, for which DINOv2's networks have no place: write a folder (--to DIR)")
    dim = state["norm.weight"].shape[0]
    state.setdefault("mask_token", torch.zeros(1, dim))
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    for block in {_block(key) for key in state if key.startswith("blocks.")}:
        for branch in ("ls1", "ls2"):
            state.setdefault(f"blocks.{block}.{branch}.gamma", torch.ones(dim))
        first, second = state[f"blocks.{block}.mlp.fc1.weight"], state[f"blocks.{block}.mlp.fc2.weight"]
        if first.shape[0] == 2 * second.shape[1]:  # gated: w12 and w3 there
            for ours, theirs in (("fc1", "w12"), ("fc2", "w3")):
                for kind in ("weight", "bias"):
                    state[f"blocks.{block}.mlp.{theirs}.{kind}"] = state.pop(f"blocks.{block}.mlp.{ours}.{kind}")
    others = [f"{other} network" for other in source.networks if other != role] + [f"{other} head" for other in source.heads]
    return state, {"not of one backbone": others} if others else {}


def _block(key: str) -> str:
    parts = key.split(".")
    return parts[2] if parts[2].isdigit() else parts[1]


def _key_sets(content: dict) -> list[set[str]]:
    """The keys of a file and of each dict of tensors in it, wrappers' prefixes taken off."""
    nested = [value for value in content.values() if isinstance(value, dict)]
    return [set(legacy.strip_prefixes({str(key): None for key in each})) for each in (content, *nested)]

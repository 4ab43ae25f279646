"""DINOv3's transformers: their file's names and those of timm's Eva, which this project's backbone takes."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from maskwise.export import legacy
from maskwise.export.source import Source
from maskwise.functional.errors import UserError

LAYOUT = "dinov3"
NAMES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge_plus", 4096: "vit_7b"}
COLOURS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HEADS = ("dino_head.", "ibot_head.", "gram_", "projectors.", "local_cls_norm.", "cls_norm.")
IMAGE_SIZE = 256
BASE = 100.0  # of the rotary periods


def recognised(content: dict) -> bool:
    """Whether a file's keys speak of DINOv3: registers under its name beside rotary periods."""
    nested = [value for value in content.values() if isinstance(value, dict)]
    names = [set(legacy.strip_prefixes({str(key): None for key in each})) for each in (content, *nested)]
    return any("storage_tokens" in keys and "cls_token" in keys for keys in names)


def read(content: dict, path: Path, overrides: dict) -> Source:
    """What a DINOv3 file holds, of its transformer; raises UserError for other keys, or a bias on k that is not masked."""
    states, unused = legacy.states_of(content, path)
    states = {role: legacy.aliased(state, overrides.get("alias", ()), path) for role, state in states.items()}
    networks = {}
    for role, state in states.items():
        legacy.group(unused, "projection heads (DINOv3's trunks are not ours)", legacy.take(state, lambda key: key.startswith(HEADS)), role)
        if not {"cls_token", "storage_tokens", "patch_embed.proj.weight"} <= state.keys():
            raise UserError(f"{path} lacks cls_token, storage_tokens or patch_embed.proj.weight: it is no dinov3 file; it has {', '.join(list(state)[:3]) or 'nothing'}")
        legacy.group(unused, "rotary periods (computed)", legacy.take(state, lambda key: key.endswith("rope_embed.periods")), role)
        networks[role] = encoder_keys(state, path, unused, role)
    spec = spec_of(next(iter(networks.values())), overrides, path)
    return Source(str(path), LAYOUT, spec, networks, unused=unused, file=path, headless="DINOv3's heads are built otherwise than ours")


def encoder_keys(state: dict[str, Tensor], path, unused: dict, role: str) -> dict[str, Tensor]:
    """DINOv3's names -> names of an Encoder on timm's Eva; qkv biases that are all zero are left out, as timm's models without them."""
    biased = any(bool(value.any()) for key, value in masked_biases(state, path).items())
    legacy.group(unused, "masks of the k bias", [key for key in state if key.endswith("qkv.bias_mask")], role)
    renamed = {}
    for key, value in state.items():
        if key.endswith("qkv.bias_mask"):
            continue
        if key.endswith("qkv.bias"):
            if not biased:
                legacy.group(unused, "zero biases of q, k and v", [key], role)
                continue
            q, _, v = value.chunk(3)
            renamed[f"backbone.{key.replace('qkv.bias', 'q_bias')}"], renamed[f"backbone.{key.replace('qkv.bias', 'v_bias')}"] = q.clone(), v.clone()
            continue
        for theirs, ours in (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")):
            key = key.replace(theirs, ours)
        for theirs, ours in ((".mlp.w1.", ".mlp.fc1_g."), (".mlp.w2.", ".mlp.fc1_x."), (".mlp.w3.", ".mlp.fc2.")):
            key = key.replace(theirs, ours)
        if key == "mask_token":
            value = value.reshape(1, -1)
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed


def masked_biases(state: dict[str, Tensor], path) -> dict[str, Tensor]:
    """The biases of q, k and v as the network adds them; raises UserError where k has one, which timm's Eva has no place for."""
    biases = {key: value for key, value in state.items() if key.endswith("qkv.bias")}
    for key, value in biases.items():
        mask = state.get(f"{key}_mask")
        k = value.chunk(3)[1]
        if bool(k.nan_to_num().any()) and (mask is None or bool(mask.nan_to_num().chunk(3)[1].any())):
            raise UserError(f"{path}: {key} has a bias on k that is not masked; no model of this kind can hold it")
    return {key: torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) for key, value in biases.items()}


def spec_of(state: dict[str, Tensor], overrides: dict, path: Path) -> dict:
    """The spec of an encoder of these shapes, named after timm's model of that width."""
    patch = state["backbone.patch_embed.proj.weight"]
    dim, patch_size = patch.shape[0], list(patch.shape[2:])
    heads = overrides.get("num_heads", max(1, dim // (128 if dim == 4096 else 64)))
    if dim % heads:
        raise UserError(f"num_heads={heads} does not divide the width {dim} of {path}: give num_heads=...")
    gated, biased = any(".mlp.fc1_g." in key for key in state), any(key.endswith("q_bias") for key in state)
    name = NAMES.get(dim, "vit_small")
    plus = "_plus" if gated and name == "vit_small" else ""
    name = f"{name}{plus}_patch16_dinov3{'_qkvb' if (biased or name == 'vit_tiny') and name != 'vit_7b' else ''}"
    width = next(value.shape[0] for key, value in state.items() if re.search(r"mlp\.fc1(_g)?\.weight$", key))
    backbone = {
        "name": name,
        "image_size": [IMAGE_SIZE // side * side for side in patch_size],
        "patch_size": patch_size,
        "class_token": True,
        "position": "size",
        "embed_dim": dim,
        "depth": 1 + max(int(key.split(".")[2]) for key in state if key.startswith("backbone.blocks.")),
        "num_heads": heads,
        "mlp_ratio": width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim,
        "num_reg_tokens": state["backbone.reg_token"].shape[1],
        "qkv_bias": biased,
        "init_values": 1.0 if any(key.endswith("gamma_1") for key in state) else None,
    }
    return {"backbone": backbone, "pooling": {"name": "cls", "dim": dim}, "norm": "after", "image_size": backbone["image_size"], "crop_pct": 0.875, **COLOURS}


def write(source: Source, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """DINOv3's flat state dict of one network, and what is left out; raises UserError for another kind of network.

    Periods are computed and q, k and v get their bias and its mask back, zeros where there was none.
    """
    role = source.role(weights or "teacher")
    state = {key.removeprefix("backbone."): value.clone() for key, value in source.networks[role].items()}
    if "reg_token" not in state or "pos_embed" in state or "cls_token" not in state:
        raise UserError(f"{source.origin} is no transformer with registers and rotary positions, as DINOv3's are: write a folder (--to DIR), or another layout")
    dim, heads = state["norm.weight"].shape[0], source.num_heads
    renamed = {}
    for key, value in state.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        for ours, theirs in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            key = key.replace(ours, theirs)
        for ours, theirs in ((".mlp.fc1_g.", ".mlp.w1."), (".mlp.fc1_x.", ".mlp.w2."), (".mlp.fc2.", ".mlp.w3." if ".mlp.fc1_g." in " ".join(state) else ".mlp.fc2.")):
            key = key.replace(ours, theirs)
        renamed[key] = value
        if key.endswith("attn.qkv.weight"):
            front = key.removesuffix("qkv.weight")
            zeros = torch.zeros(dim)
            renamed[f"{front}qkv.bias"] = torch.cat([state.get(f"{front}q_bias", zeros), zeros, state.get(f"{front}v_bias", zeros)])
            renamed[f"{front}qkv.bias_mask"] = torch.cat([torch.ones(dim), zeros, torch.ones(dim)])
    renamed.setdefault("mask_token", torch.zeros(1, dim))
    quarter = dim // heads // 4
    renamed["rope_embed.periods"] = BASE ** (2 * torch.arange(quarter, dtype=torch.float32) / (dim // heads // 2))
    others = [f"{other} network" for other in source.networks if other != role] + [f"{other} head" for other in source.heads]
    return renamed, {"not of one backbone": others} if others else {}

"""DINOv2 backbones, with and without registers: reading and writing of their key names."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats.dino_family import add_channel_stats, encoder_spec, num_heads
from maskwise.export.formats.imported_model import ImportedModel
from maskwise.export.formats.published_heads import heads_of
from maskwise.export.formats.research_file import ResearchFile, add_unused, take

LAYOUT = "dinov2"
NAMES = {384: "vit_small_patch14", 768: "vit_base_patch14", 1024: "vit_large_patch14", 1536: "vit_giant_patch14"}
HEADS = ("dino_head.", "ibot_head.", "gram_")


def recognized(file: ResearchFile) -> bool:
    """Return whether a file has DINOv2's keys: its mask token or registers, and layer scales."""
    return any(
        state.keys() & {"mask_token", "register_tokens"} and any(key.endswith("ls1.gamma") for key in state)
        for state in file.networks.values()
    )


def read(file: ResearchFile, settings: dict) -> ImportedModel:
    """Read the backbone of a DINOv2 file; raises UserError for other keys.

    With registers, the class token's position is added to the token as in timm, so that features are equal.
    """
    path = file.path
    for role, state in file.networks.items():
        heads = take(state, lambda key: key.startswith(HEADS))
        add_unused(file.unused, "projection heads (DINOv2's structure differs from ours)", heads, role)
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
            raise UserError(
                f"{path} lacks cls_token, pos_embed or patch_embed.proj.weight: it is no dinov2 file; "
                f"it has {', '.join(list(state)[:3]) or 'nothing'}"
            )
    spec = spec_of(next(iter(file.networks.values())), settings, path)
    networks = {role: encoder_keys(state) for role, state in file.networks.items()}
    reason = "DINOv2's heads have a different structure than ours"
    model = ImportedModel(
        str(path), LAYOUT, spec, networks, unused=file.unused, file=path, headless=reason, takes={"num_heads", "alias"}
    )
    add_channel_stats(model, settings)
    return model


def spec_of(state: dict[str, Tensor], settings: dict, path: Path) -> dict:
    """Infer the encoder spec from tensor shapes; the name is timm's model of that width."""
    patch, rows = state["patch_embed.proj.weight"], state["pos_embed"].shape[1] - 1
    dim, side = patch.shape[0], math.isqrt(rows)
    if side * side != rows:
        raise UserError(f"{path}: its position table of {rows + 1} rows is not a square grid: unknown layout")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    gated = any(".mlp.w12." in key for key in state)
    width = next(value.shape[0] for key, value in state.items() if re.search(r"mlp\.(w12|fc1)\.weight$", key))
    depth = len({_block(key) for key in state if key.startswith("blocks.")})
    name = NAMES[1536] if gated else NAMES.get(dim, NAMES[384])
    backbone = {
        "name": f"{name}_{'reg4_' if registers else ''}dinov2",
        "image_size": [side * pixels for pixels in patch.shape[2:]],
        "patch_size": list(patch.shape[2:]),
        "class_token": True,
        "position": "size" if registers else "offset",
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads(settings, dim, heads_of(dim, depth), path),
        "mlp_ratio": width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim,
        "init_values": 1.0 if any(key.endswith("ls1.gamma") for key in state) else None,
        **({"reg_tokens": registers, "no_embed_class": True} if registers else {}),
    }
    return encoder_spec(backbone, {"name": "cls", "dim": dim}, "after")


def encoder_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename DINOv2's keys to those of an Encoder."""
    state = dict(state)
    if "register_tokens" in state:
        table = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = table[:, 1:].clone()
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed


def write(model: ImportedModel, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return one network as a flat DINOv2 state dict, and the keys that are left out, by group.

    Missing layer scales are written as ones, missing biases and a missing mask token as zeros, which leaves features
    equal. The table has one row before the patches', of zeros if the class token has none; rows of registers are added
    to the registers.
    Raises UserError for tensors that DINOv2 lacks.
    """
    role = model.role(weights or "teacher")
    state = {key.removeprefix("backbone."): value.clone() for key, value in model.networks[role].items()}
    unknown = [
        key for key in state if key.startswith(("pooling.", "norm_pre.", "rope")) or "_norm." in key or "gamma_" in key
    ]
    absent = {"cls_token": "no class token", "pos_embed": "no position table"}
    problems = unknown + [text for key, text in absent.items() if key not in state]
    if problems:
        raise UserError(f"{model.origin} has {problems[0]}, unlike DINOv2's networks: write a folder (--to DIR)")
    dim = state["norm.weight"].shape[0]
    state.setdefault("mask_token", torch.zeros(1, dim))
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    table = state["pos_embed"]
    prefix, patches = table.split((model.table_prefix, table.shape[1] - model.table_prefix), dim=1)
    if prefix.shape[1] > 1:
        state["register_tokens"] = state["register_tokens"] + prefix[:, 1:]
    row = prefix[:, :1] if prefix.shape[1] else torch.zeros_like(state["cls_token"])
    state["pos_embed"] = torch.cat([row, patches], dim=1)
    for block in {_block(key) for key in state if key.startswith("blocks.")}:
        for branch in ("ls1", "ls2"):
            state.setdefault(f"blocks.{block}.{branch}.gamma", torch.ones(dim))
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            rows = state[f"blocks.{block}.{layer}.weight"].shape[0]
            state.setdefault(f"blocks.{block}.{layer}.bias", torch.zeros(rows))
        first, second = state[f"blocks.{block}.mlp.fc1.weight"], state[f"blocks.{block}.mlp.fc2.weight"]
        if first.shape[0] == 2 * second.shape[1]:  # a gated MLP, named w12 and w3 in DINOv2
            for ours, theirs in (("fc1", "w12"), ("fc2", "w3")):
                for kind in ("weight", "bias"):
                    state[f"blocks.{block}.mlp.{theirs}.{kind}"] = state.pop(f"blocks.{block}.mlp.{ours}.{kind}")
    return state, model.other_parts(role)


def _block(key: str) -> str:
    parts = key.split(".")
    return parts[2] if parts[2].isdigit() else parts[1]

"""DINOv3 transformers: reading and writing of their key names; the backbone is timm's Eva."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats.dino_family import add_channel_stats, encoder_spec, num_heads
from maskwise.export.formats.imported_model import ImportedModel
from maskwise.export.formats.published_heads import heads_of
from maskwise.export.formats.research_file import ResearchFile, add_unused, take

LAYOUT = "dinov3"
NAMES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge_plus", 4096: "vit_7b"}
HEADS = ("dino_head.", "ibot_head.", "gram_", "projectors.", "local_cls_norm.", "cls_norm.")
IMAGE_SIZE = 256
ROPE_BASE = 100.0  # of the rotary periods
RENAMED = (  # DINOv3, timm's Eva
    ("storage_tokens", "reg_token"),
    ("ls1.gamma", "gamma_1"),
    ("ls2.gamma", "gamma_2"),
    (".mlp.w1.", ".mlp.fc1_g."),
    (".mlp.w2.", ".mlp.fc1_x."),
    (".mlp.w3.", ".mlp.fc2."),
)


def recognized(file: ResearchFile) -> bool:
    """Return whether a file has DINOv3's keys: its registers and a class token."""
    return any(state.keys() >= {"storage_tokens", "cls_token"} for state in file.networks.values())


def read(file: ResearchFile, settings: dict) -> ImportedModel:
    """Read the transformer of a DINOv3 file; raises UserError for other keys or an unmasked bias on k."""
    path, networks = file.path, {}
    for role, state in file.networks.items():
        heads = take(state, lambda key: key.startswith(HEADS))
        add_unused(file.unused, "projection heads (DINOv3's structure differs from ours)", heads, role)
        if not {"cls_token", "storage_tokens", "patch_embed.proj.weight"} <= state.keys():
            raise UserError(
                f"{path} lacks cls_token, storage_tokens or patch_embed.proj.weight: it is no dinov3 file; "
                f"it has {', '.join(list(state)[:3]) or 'nothing'}"
            )
        periods = take(state, lambda key: key.endswith("rope_embed.periods"))
        add_unused(file.unused, "rotary periods (computed)", periods, role)
        networks[role] = encoder_keys(state, path, file.unused, role)
    spec = spec_of(next(iter(networks.values())), settings, path)
    reason = "DINOv3's heads have a different structure than ours"
    model = ImportedModel(
        str(path), LAYOUT, spec, networks, unused=file.unused, file=path, headless=reason, takes={"num_heads", "alias"}
    )
    add_channel_stats(model, settings)
    return model


def encoder_keys(state: dict[str, Tensor], path, unused: dict, role: str) -> dict[str, Tensor]:
    """Rename DINOv3's keys to those of an Encoder; all-zero qkv biases are dropped, as in timm's models."""
    has_bias = any(bool(value.any()) for value in masked_biases(state, path).values())
    add_unused(unused, "masks of the k bias", [key for key in state if key.endswith("qkv.bias_mask")], role)
    renamed = {}
    for key, value in state.items():
        if key.endswith("qkv.bias_mask"):
            continue
        if key.endswith("qkv.bias"):
            if not has_bias:
                add_unused(unused, "zero biases of q, k and v", [key], role)
                continue
            q, _, v = value.chunk(3)
            renamed[f"backbone.{key.replace('qkv.bias', 'q_bias')}"] = q.clone()
            renamed[f"backbone.{key.replace('qkv.bias', 'v_bias')}"] = v.clone()
            continue
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        if key == "mask_token":
            value = value.reshape(1, -1)
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed


def masked_biases(state: dict[str, Tensor], path) -> dict[str, Tensor]:
    """Return the biases of q and v by key; raises UserError for a bias on k, which timm's Eva does not have."""
    biases = {key: value for key, value in state.items() if key.endswith("qkv.bias")}
    for key, value in biases.items():
        mask = state.get(f"{key}_mask")
        k = value.chunk(3)[1]
        if bool(k.nan_to_num().any()) and (mask is None or bool(mask.nan_to_num().chunk(3)[1].any())):
            raise UserError(f"{path}: {key} has a bias on k that is not masked; timm's Eva models cannot hold it")
    return {key: torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) for key, value in biases.items()}


def spec_of(state: dict[str, Tensor], settings: dict, path: Path) -> dict:
    """Infer the encoder spec from tensor shapes; the name is timm's model of that width."""
    patch = state["backbone.patch_embed.proj.weight"]
    dim, patch_size = patch.shape[0], list(patch.shape[2:])
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("backbone.blocks."))
    gated, has_bias = any(".mlp.fc1_g." in key for key in state), any(key.endswith("q_bias") for key in state)
    name = NAMES.get(dim, "vit_small")
    plus = "_plus" if gated and name == "vit_small" else ""
    name = f"{name}{plus}_patch16_dinov3{'_qkvb' if (has_bias or name == 'vit_tiny') and name != 'vit_7b' else ''}"
    width = next(value.shape[0] for key, value in state.items() if re.search(r"mlp\.fc1(_g)?\.weight$", key))
    backbone = {
        "name": name,
        "image_size": [IMAGE_SIZE // side * side for side in patch_size],
        "patch_size": patch_size,
        "class_token": True,
        "position": "size",
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads(settings, dim, heads_of(dim, depth, project=LAYOUT), path),
        "mlp_ratio": width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim,
        "num_reg_tokens": state["backbone.reg_token"].shape[1],
        "qkv_bias": has_bias,
        "init_values": 1.0 if any(key.endswith("gamma_1") for key in state) else None,
    }
    return encoder_spec(backbone, {"name": "cls", "dim": dim}, "after")


def write(model: ImportedModel, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return one network as a flat DINOv3 state dict, and the keys that are left out, by group.

    Rotary periods are computed; qkv biases and their masks are restored, zeros where there were none.
    Raises UserError for another kind of network.
    """
    role = model.role(weights or "teacher")
    state = {key.removeprefix("backbone."): value.clone() for key, value in model.networks[role].items()}
    if "reg_token" not in state or "pos_embed" in state or "cls_token" not in state:
        raise UserError(
            f"{model.origin} is no transformer with registers and rotary positions, as DINOv3's are: "
            "write a folder (--to DIR), or another layout"
        )
    model.require_num_heads()
    dim, heads = state["norm.weight"].shape[0], model.num_heads
    gated = any(".mlp.fc1_g." in key for key in state)
    zeros = torch.zeros(dim)
    renamed = {}
    for key, value in state.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        for theirs, ours in RENAMED:
            if gated or theirs != ".mlp.w3.":  # an MLP without gate has fc1 and fc2 in both
                key = key.replace(ours, theirs)
        renamed[key] = value
        if key.endswith("attn.qkv.weight"):
            prefix = key.removesuffix("qkv.weight")
            biases = [state.get(f"{prefix}q_bias", zeros), zeros, state.get(f"{prefix}v_bias", zeros)]
            renamed[f"{prefix}qkv.bias"] = torch.cat(biases)
            renamed[f"{prefix}qkv.bias_mask"] = torch.cat([torch.ones(dim), zeros, torch.ones(dim)])
    renamed.setdefault("mask_token", torch.zeros(1, dim))
    quarter = dim // heads // 4
    renamed["rope_embed.periods"] = ROPE_BASE ** (2 * torch.arange(quarter, dtype=torch.float32) / (dim // heads // 2))
    return renamed, model.other_parts(role)

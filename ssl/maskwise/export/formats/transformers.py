"""transformers' folders, as save_pretrained writes them: Dinov2, ViT, ViTMAE, ViTMSN and DINOv3 models."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.export.formats import dino_family, dinov2, dinov3
from maskwise.export.formats.imported_model import SINGLE_NETWORK, ImportedModel
from maskwise.export.formats.research_file import add_unused
from maskwise.export.formats.spec_checks import json_object, user_errors
from maskwise.nn.pooling import POOLINGS

LAYOUT = "transformers"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
MODELS = ("dinov2", "dinov2_with_registers", "vit", "vit_mae", "vit_msn", "dinov3_vit")
DEFAULT_STATS = {"vit": {"mean": [0.5] * 3, "std": [0.5] * 3}}  # of transformers' processor; ImageNet's for the others
EPS = {"dinov3_vit": 1e-5}  # of layer norms in the models here; 1e-6 for the others
CLASS_TOKEN = "embeddings.cls_token"
STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "layernorm.": "norm.",
    "norm.": "norm.",
}
BLOCK = {  # part of a layer -> its name in the authors' code
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "attention.o_proj.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in.": "mlp.w12.",
    "mlp.weights_out.": "mlp.w3.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "mlp.gate_proj.": "mlp.w1.",
    "mlp.up_proj.": "mlp.fc1.",
    "mlp.down_proj.": "mlp.fc2.",
}
GATED = {"mlp.fc1.": "mlp.w2.", "mlp.fc2.": "mlp.w3."}  # beside a gate
PROJECTION = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)")


def recognized(folder: Path) -> bool:
    """Return whether a folder's config.json is that of a model that is read here."""
    return json_object(folder / CONFIG).get("model_type") in MODELS


def is_foreign(keys) -> bool:
    """Return whether keys are those of a model of transformers."""
    return any(key.endswith(CLASS_TOKEN) for key in keys)


def read(folder: Path, tensors: dict[str, Tensor], file: Path) -> ImportedModel:
    """Read a folder of transformers; pooled is the normalized class token.

    A pooling without weights that maskwise described in config.json is kept. Raises UserError for a model whose
    settings the networks here do not have.
    """
    config = json_object(folder / CONFIG)
    kind = config["model_type"]
    check_settings(config, folder)
    state, unused = authors_keys(tensors)
    with user_errors(folder):
        settings = {"num_heads": int(config["num_attention_heads"]), **processor_stats(folder)}
        if kind == "dinov3_vit":
            spec, networks = dinov3_network(state, settings, folder, unused)
        elif kind.startswith("dinov2"):
            spec, networks = dinov2.spec_of(state, settings, folder), dinov2.encoder_keys(state)
        else:
            spec = dino_family.transformer_spec(state, {}, {}, "after", settings, folder)
            networks = dino_family.encoder_keys(state)
        spec["backbone"]["position"] = "size"
        eps = float(config.get("layer_norm_eps", 1e-6))
        if eps != EPS.get(kind, 1e-6):
            spec["backbone"]["norm_eps"] = eps
        spec |= {**DEFAULT_STATS.get(kind, {}), **{key: settings[key] for key in ("mean", "std") if key in settings}}
        model = ImportedModel(str(folder), LAYOUT, spec, {SINGLE_NETWORK: networks}, unused=unused, file=file)
        dino_family.add_channel_stats(model, settings)
        add_crop(spec, folder)
    if "mean" not in settings and "maskwise" not in config and not model.notes:
        model.notes.append(
            f"it has no image_mean in {PROCESSOR}: mean {spec['mean']} and std {spec['std']} are assumed"
        )
    restore_description(model, config.get("maskwise"))
    return model


def check_settings(config: dict, folder: Path) -> None:
    """Raise UserError for settings that the networks here do not have."""
    fixed = {"hidden_act": "gelu", "rope_theta": 100.0, "apply_layernorm": True, "key_bias": False}
    if config["model_type"] == "dinov3_vit":
        fixed |= {"layer_norm_eps": EPS["dinov3_vit"], "query_bias": True, "value_bias": True}
        if config.get("use_gated_mlp"):
            fixed["hidden_act"] = "silu"
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder}: {key}={config[key]} in config.json, and only {value} is read")


def authors_keys(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Rename a model's tensors to the names of DINO, DINOv2 or DINOv3; also return the unused keys by group."""
    base = next(key for key in tensors if key.endswith(CLASS_TOKEN)).removesuffix(CLASS_TOKEN)
    own = {key.removeprefix(base): value for key, value in tensors.items() if key.startswith(base)}
    gated = any(".mlp.gate_proj." in key for key in own)
    state: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    unused: dict[str, list[str]] = {}
    for key, value in own.items():
        layer = re.match(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.*)", key)
        if layer is None:
            name = _renamed(key, STEM)
        elif projection := PROJECTION.fullmatch(layer[2]):
            parts.setdefault((f"blocks.{layer[1]}.attn.qkv.", projection[2]), {})[projection[1][0]] = value
            continue
        else:
            name = _renamed(layer[2], BLOCK)
            name = _renamed(name, GATED) or name if gated and name else name
            name = name and f"blocks.{layer[1]}.{name}"
        if name is None:
            add_unused(unused, "pooler" if key.startswith("pooler.") else "other parts", [key], SINGLE_NETWORK)
        else:
            state[name] = value
    for (name, weight_or_bias), found in parts.items():
        zeros = torch.zeros_like(next(iter(found.values())))  # DINOv3 has no bias on k
        state[name + weight_or_bias] = torch.cat([found.get(letter, zeros) for letter in "qkv"])
    for key in tensors.keys() - {base + key for key in own}:
        add_unused(unused, key.partition(".")[0], [key], SINGLE_NETWORK)
    return state, unused


def _renamed(key: str, names: dict[str, str]) -> str | None:
    start = next((start for start in names if key.startswith(start)), None)
    return None if start is None else names[start] + key[len(start) :]


def dinov3_network(state: dict[str, Tensor], settings: dict, folder: Path, unused: dict) -> tuple[dict, dict]:
    """Return the encoder spec and tensors of a DINOv3 model under its authors' names."""
    state = dict(state)
    state["storage_tokens"] = state.pop("register_tokens")
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        ones = torch.ones(state[key].shape[0] // 3)
        state[f"{key}_mask"] = torch.cat([ones, torch.zeros_like(ones), ones])
    own: dict[str, list[str]] = {}
    network = dinov3.encoder_keys(state, folder, own, SINGLE_NETWORK)
    for group, keys in own.items():  # the masks are made here
        add_unused(unused, group, [key for key in keys if not key.endswith("_mask")], SINGLE_NETWORK)
    spec = dinov3.spec_of(network, settings, folder)
    size = json_object(folder / CONFIG).get("image_size", dinov3.IMAGE_SIZE)
    sizes = size if isinstance(size, list) else [size, size]
    sides = [side // patch * patch for side, patch in zip(sizes, spec["backbone"]["patch_size"])]
    spec["backbone"]["image_size"] = spec["image_size"] = sides
    return spec, network


def processor_stats(folder: Path) -> dict[str, list[float]]:
    """Return mean and std of the folder's image processor; {} without."""
    processor = json_object(folder / PROCESSOR)
    if not processor.get("image_mean") or not processor.get("image_std"):
        return {}
    return {key: [float(value) for value in processor[f"image_{key}"]] for key in ("mean", "std")}


def add_crop(spec: dict, folder: Path) -> None:
    """Set image size and crop of a spec to those of the folder's image processor."""
    processor = json_object(folder / PROCESSOR)
    size, crop = processor.get("size"), processor.get("crop_size")
    if isinstance(size, int):
        size = {"shortest_edge": size}
    sides = crop if processor.get("do_center_crop") and isinstance(crop, dict) else size
    if not isinstance(size, dict) or not isinstance(sides, dict) or "height" not in sides:
        return
    target = [int(sides["height"]), int(sides["width"])]
    if any(side % patch for side, patch in zip(target, spec["backbone"]["patch_size"])):
        return
    spec["image_size"] = target
    spec["crop_pct"] = min(1.0, max(target) / int(size.get("shortest_edge", max(target))))


def restore_description(model: ImportedModel, section) -> None:
    """Take pooling and input settings from maskwise's section of a config.json that transformers has copied."""
    own = section.get("encoder") if isinstance(section, dict) else None
    if not isinstance(own, dict):
        return
    with user_errors(model.origin):
        described = dict(own["pooling"])
        with torch.device("meta"):
            pooling = POOLINGS[described.pop("name")](**described)
        if next(pooling.parameters(), None) is None:
            model.spec |= {"pooling": own["pooling"], "norm": own["norm"]}
        else:
            model.notes.append(
                f"the weights of its pooling {own['pooling']['name']} were not saved by transformers: "
                "its vector is the class token"
            )
        model.spec |= {key: own[key] for key in ("image_size", "mean", "std", "crop_pct")}

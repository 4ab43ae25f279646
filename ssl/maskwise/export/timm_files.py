"""timm's own files and folders: a state dict with a name beside it, or `config.json` and weights as timm writes them to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from maskwise.export import pickles
from maskwise.export.source import ONLY, Source
from maskwise.export.specs import plausible, told
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import Backbone
from maskwise.nn.encoder import CROP_PCT
from maskwise.nn.maps import MapBackbone
from maskwise.nn.timm_models import ANATOMIES
from maskwise.nn.weights import CLASSIFIER, strip_prefixes

OWN = ("image_size", "patch_size", "class_token", "position")
WEIGHTS = ("backbone.safetensors", "model.safetensors", "pytorch_model.bin")
LEFT_OUT = (*CLASSIFIER, "mask_token", "dist_token")


def read(path: Path, overrides: dict) -> Source:
    """A timm state dict; its model is `overrides["name"]`. Raises UserError without it, and where keys or shapes differ."""
    if "name" not in overrides:
        raise UserError("a timm file does not say which model it is of: give name=..., such as name=vit_small_patch16_224")
    return source_of(overrides["name"], path, str(path), {key: overrides[key] for key in OWN if key in overrides})


def spoken(content: dict) -> bool:
    """Whether a file's keys are those that timm alone gives its transformers."""
    names = strip_prefixes(next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content))
    if {"mask_token", "storage_tokens", "register_tokens"} & names.keys():
        return False
    return "reg_token" in names or any(key.startswith(("norm_pre.", "fc_norm.", "blocks.0.ls1.", "blocks.0.attn.q_norm", "blocks.0.attn.q_bias")) for key in names)


def recognised(folder: Path) -> bool:
    """Whether a folder is one that timm wrote."""
    return _config(folder) is not None and _weights(folder) is not None


def read_folder(folder: Path) -> Source:
    """A folder that timm wrote: its config.json names the model, its arguments, mean and std."""
    config, options = _config(folder), {}
    with told(folder):
        for key, value in (config.get("model_args") or {}).items():
            if key in ("img_size", "image_size"):
                options["image_size"] = value
            elif key not in ("num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad"):
                options[key] = value
        plausible(options)
        source = source_of(config["architecture"], _weights(folder), str(folder), options)
        pretrained = config.get("pretrained_cfg") or {}
        for key in ("mean", "std"):
            if pretrained.get(key):
                source.spec[key] = [float(value) for value in pretrained[key]]
    return source


def source_of(name: str, path: Path, origin: str, options: dict) -> Source:
    """The timm model `name` with the weights of a file; its tag, where it has one, gives mean and std."""
    backbone = Backbone(name, weights=path, **options)
    backbone.name = name.partition(".")[0]
    content = pickles.read(path)
    held = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    maps = isinstance(backbone, MapBackbone)
    left_out = ANATOMIES[backbone.kind].CLASSIFIER if maps else LEFT_OUT
    left = [key for key, value in strip_prefixes(held).items() if isinstance(value, Tensor) and key.startswith(left_out)]
    spec = {
        "backbone": backbone.spec(),
        "pooling": {"name": "cls" if backbone.has_class_token else "gap", "dim": backbone.dim} if maps or backbone.has_class_token else None,
        "norm": "before" if backbone.kind in ("SwinTransformer", "SwinTransformerV2", "PoolingVisionTransformer", "MlpMixer") else "after",
        "image_size": list(backbone.image_size),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "crop_pct": CROP_PCT,
    }
    state = {key if key.startswith("norm.") else f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    return Source(origin, "timm", spec, {ONLY: state}, unused={"classifier and tokens of pretraining": left} if left else {}, file=path)


def write(source: Source, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """timm's state dict (num_classes=0) of one network, and what is left out; raises UserError for a pooling with weights."""
    role = source.role(weights or "teacher")
    state = source.networks[role]
    if any(key.startswith("pooling.") for key in state):
        raise UserError(f"{source.origin} pools with {source.spec['pooling']['name']}, for which timm has no place: write a folder (--to DIR), which keeps it")
    kept = {key.removeprefix("backbone."): value.clone() for key, value in state.items() if key != "backbone.mask_token"}
    others = [f"{other} network" for other in source.networks if other != role] + [f"{other} head" for other in source.heads]
    left = {"mask token": ["backbone.mask_token"] if "backbone.mask_token" in state else [], "not of one backbone": others}
    return kept, {name: keys for name, keys in left.items() if keys}


def _config(folder: Path) -> dict | None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("architecture"), str) else None


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)

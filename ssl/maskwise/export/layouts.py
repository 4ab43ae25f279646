"""All layouts that an encoder is read from or written to; every renaming of keys happens here."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.export import folder as exported
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import Backbone, mismatch, read_tensors, strip_prefixes
from maskwise.nn.encoder import Encoder, encoder_from_spec

MODEL, SPEC = "model.safetensors", "encoder.json"
LAYOUTS = ("dino", "ibot", "attmask", "simpool", "timm")
NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224", 1024: "vit_large_patch16_224"}
POOLING_PARENTS = {"simpool.": "after", "gp.pool.": "before", "global_pool.pool.": "before"}
OVERRIDES = (
    "position", "image_size", "num_heads", "gamma", "min_scope", "pooling_heads", "mean", "std", "crop_pct", "name", "patch_size", "class_token",
)  # fmt: skip


def load(path, *, weights: str = "teacher", layout: str | None = None, **overrides) -> Encoder:
    """Read an encoder, in eval mode, from a run folder, an exported folder or a weights file.

    A file may be one of DINO, iBOT, AttMask or SimPool (whole training file or backbone only), recognised by its keys;
    `layout` says so instead, and "timm" takes a plain timm file together with `name`. `weights` picks "teacher" or
    "student". `overrides`: position, image_size, mean, std, crop_pct; for files also num_heads (else width / 64),
    gamma (SimPool files do not hold it; None: no power), min_scope and pooling_heads.
    Only tensors are read, never code. Raises UserError when something is missing, unknown or does not fit.
    """
    path = Path(path)
    if weights not in ("teacher", "student"):
        raise UserError(f"weights={weights!r} is unknown: choose teacher or student")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise UserError(f"load takes no {unknown[0]}; what can be overridden: {', '.join(OVERRIDES)}")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, an exported folder or a weights file")
    if path.is_dir():
        encoder = _load_folder(path, weights)
    elif layout == "timm":
        encoder = _load_timm(path, overrides)
    else:
        encoder = _load_research(path, weights, layout, overrides)
    return _overridden(encoder, overrides).eval()


def _load_folder(folder: Path, weights: str) -> Encoder:
    if exported.spec_of(folder) is not None:
        return _filled(*exported.read(folder), folder)
    checkpoint = folder
    if (folder / "checkpoints").is_dir():
        last = folder / "checkpoints" / "last"
        if not last.is_file():
            raise UserError(f"{folder} holds no checkpoint yet: let the run reach its first one (train.save_every)")
        checkpoint = last.parent / last.read_text().strip()
    if not (checkpoint / SPEC).is_file():
        raise UserError(f"{folder} is neither a run folder nor an exported one: it has no config.json of ours and no checkpoints")
    try:
        spec = json.loads((checkpoint / SPEC).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {checkpoint / SPEC}: {error}; take an earlier checkpoint") from None
    front = f"{weights}.encoder."
    state = {key[len(front) :]: value for key, value in read_tensors(checkpoint / MODEL).items() if key.startswith(front)}
    if not state:
        raise UserError(f"{checkpoint} holds no {weights}: choose weights=teacher or weights=student")
    return _filled(spec, state, checkpoint)


def _filled(spec: dict, state: dict[str, Tensor], source: Path) -> Encoder:
    """The encoder of a spec with these weights; whether there is a mask token the weights say."""
    spec["backbone"]["mask_token"] = "backbone.mask_token" in state
    encoder = encoder_from_spec(spec)
    _fill(encoder, state, source)
    return encoder


def _fill(encoder: Encoder, state: dict[str, Tensor], source: Path) -> None:
    own = encoder.state_dict()
    wrong = mismatch(own.keys() - state.keys(), state.keys() - own.keys())
    if wrong:
        raise UserError(f"{source} does not fit the encoder: it {wrong}; name its layout ({', '.join(LAYOUTS)}) if it was guessed wrong")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(f"{source} does not fit the encoder: {key} is {list(value.shape)} there and {list(own[key].shape)} here")
    encoder.load_state_dict(state)


def _overridden(encoder: Encoder, overrides: dict) -> Encoder:
    """Set what may differ from the file without a change of weights."""
    if "image_size" in overrides:
        size = overrides["image_size"]
        encoder.image_size = (size, size) if isinstance(size, int) else tuple(size)
        if any(side % patch for side, patch in zip(encoder.image_size, encoder.backbone.patch_size)):
            raise UserError(f"image_size={size} is not a multiple of the patch {encoder.backbone.patch_size[0]}: choose a multiple")
    if "position" in overrides:
        if overrides["position"] not in ("offset", "size", "offset_always"):
            raise UserError(f"position={overrides['position']!r} is unknown: choose offset, size or offset_always")
        encoder.backbone.position = overrides["position"]
    for key in ("gamma", "min_scope"):
        if key in overrides and not hasattr(encoder.pooling, key):
            raise UserError(f"{key} belongs to the pooling simpool and this encoder has another: leave it out")
        if key in overrides:
            setattr(encoder.pooling, key, overrides[key])
    for key in ("mean", "std"):
        if key in overrides:
            setattr(encoder, key, tuple(overrides[key]))
    encoder.crop_pct = overrides.get("crop_pct", encoder.crop_pct)
    return encoder


def _load_timm(path: Path, overrides: dict) -> Encoder:
    if "name" not in overrides:
        raise UserError("a timm file does not say which model it is of: give name=..., such as name=vit_small_patch16_224")
    wanted = ("image_size", "patch_size", "class_token", "position")
    backbone = Backbone(overrides["name"], weights=path, **{key: overrides[key] for key in wanted if key in overrides})
    if not backbone.has_class_token:
        raise UserError(f"{overrides['name']} has no class token and its file no pooling of ours: load it with Backbone(weights=...) and add a pooling")
    from maskwise.nn.pooling import CLS

    return Encoder(backbone, CLS(backbone.dim))


def _allowed() -> list:
    """What a legacy training file holds beside tensors: its arguments and NumPy's scalars, under either of NumPy's names."""
    try:
        from numpy._core import multiarray
    except ImportError:
        from numpy.core import multiarray
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    old = [(multiarray.scalar, f"{place}.multiarray.scalar") for place in ("numpy.core", "numpy._core")]
    return [argparse.Namespace, np.dtype, *dtypes, *old]


def _load_research(path: Path, weights: str, layout: str | None, overrides: dict) -> Encoder:
    """One of the DINO family's files: the shape is read off the tensors."""
    content = read_tensors(path, _allowed())
    state = _choose(content, weights, path)
    pooling, order = _take_simpool(state)
    if layout == "simpool" and not pooling:
        raise UserError(f"{path} has no SimPool weights: it is no simpool file (leave layout out to have it recognised)")
    if layout in ("dino", "ibot", "attmask") and pooling:
        raise UserError(f"{path} has SimPool weights: load it with layout=simpool")
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if key not in state:
            raise UserError(f"{path} lacks {key}: it is no vision transformer of {', '.join(LAYOUTS[:4])}; it has {', '.join(list(state)[:3]) or 'nothing'}")
    spec = _spec_of(state, pooling, content.get("args"), order, overrides, path)
    encoder = encoder_from_spec(spec)
    _fill(encoder, {**_encoder_keys(state), **{f"pooling.{key}": value for key, value in pooling.items()}}, path)
    return encoder


def _choose(content: dict, weights: str, path: Path) -> dict[str, Tensor]:
    """The backbone's part of a file, wrappers' prefixes and projection heads left out."""
    nested = [key for key, value in content.items() if isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())]
    held = [key for key in nested if key in ("teacher", "student", "state_dict", "state_dict_ema", "model", "model_ema")]
    if weights in held:
        chosen = content[weights]
    elif {"teacher", "student"} & set(held):
        raise UserError(f"{path} holds no {weights}; it has {', '.join(held)}: choose weights={next(key for key in held if key in ('teacher', 'student'))}")
    elif held:
        chosen = content[next(key for key in ("state_dict_ema", "model_ema", "state_dict", "model") if key in held)]
    elif nested:
        raise UserError(f"{path} has no teacher, student or state_dict; it has {', '.join(map(str, content))}: is it an encoder's file?")
    else:
        chosen = content
    state = {key: value for key, value in strip_prefixes(chosen).items() if isinstance(value, Tensor)}
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def _take_simpool(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Move SimPool's tensors out of `state`, whatever module held them; also where the final norm stands."""
    taken, order = {}, "after"
    for key in list(state):
        for parent, place in POOLING_PARENTS.items():
            if key.startswith(parent):
                name, order = key[len(parent) :], place
                taken[name] = state.pop(key).reshape(1) if name == "beta" else state.pop(key)
                break
    return taken, order


def _spec_of(state: dict, pooling: dict, args, order: str, overrides: dict, path: Path) -> dict:
    table, patch = state["pos_embed"], state["patch_embed.proj.weight"]
    dim, patch_size = patch.shape[0], tuple(patch.shape[2:])
    has_class = "cls_token" in state
    count = table.shape[1] - has_class
    if not has_class and math.isqrt(count) ** 2 != count:
        state["pos_embed"] = table[:, 1:]  # SimPool's first release kept the class token's row and never read it
        count -= 1
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"{path}: its position table of {table.shape[1]} rows is of no square grid; this layout is not known")
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    scaled = state.get("blocks.0.gamma_1")
    heads = overrides.get("num_heads", max(1, dim // 64))
    if dim % heads:
        raise UserError(f"num_heads={heads} does not divide the width {dim} of {path}: give num_heads=...")
    row: dict = {"name": "cls", "dim": dim}
    if pooling:
        row = {
            "name": "simpool",
            "dim": dim,
            "gamma": _gamma(args, overrides, path),
            "num_heads": overrides.get("pooling_heads", 1),
            "min_scope": overrides.get("min_scope", "batch"),
            "beta": "beta" in pooling,
        }
        if row["gamma"] is None:
            pooling.pop("beta", None)
            row["beta"] = False
    elif not has_class:
        raise UserError(f"{path} has neither a class token nor SimPool weights: there is nothing to pool with")
    backbone = {
        "name": NAMES.get(dim, NAMES[192]),
        "image_size": [side * each for each in patch_size],
        "patch_size": list(patch_size),
        "class_token": has_class,
        "position": "offset_always" if pooling and order == "after" else "offset",
        "mask_token": "masked_embed" in state,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }
    if scaled is not None:
        backbone["init_values"] = 1.0
    size = backbone["image_size"]
    colours = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return {"backbone": backbone, "pooling": row, "norm": order, "image_size": size, "crop_pct": 0.875, **colours}


def _gamma(args, overrides: dict, path: Path) -> float | None:
    if "gamma" in overrides:
        return overrides["gamma"]
    if hasattr(args, "gamma"):
        return args.gamma if args.gamma is None else float(args.gamma)
    raise UserError(f"{path} does not say which gamma its SimPool had: give gamma=1.25 (its transformers), or gamma=None where its name says no_gamma")


def _encoder_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the DINO family -> names of an Encoder."""
    renamed = {}
    for key, value in state.items():
        if key == "masked_embed":
            key = "mask_token"
        for branch in ("1", "2"):
            key = key.replace(f".gamma_{branch}", f".ls{branch}.gamma")
        renamed[key if key.startswith("norm.") else f"backbone.{key}"] = value
    return renamed

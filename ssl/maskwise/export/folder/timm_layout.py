"""timm's form of an encoder's backbone: architecture, arguments, tensors and config.json fields."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn.backbones.external import is_external
from maskwise.nn.backbones.families import conv_stem
from maskwise.nn.backbones.families.conv_stem import StemOptions
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.nn.backbones.pretrained import mismatch_text
from maskwise.nn.backbones.timm_registry import timm
from maskwise.nn.backbones.transformer import TransformerBackbone
from maskwise.nn.encoder import Encoder
from maskwise.process.external_code import VARIABLE, module_of

NORM_PREFIXES = ("norm.", "head.norm.", "fc_norm.")  # key prefixes of a timm model's last norm


@dataclass(frozen=True)
class TimmLayout:
    """A timm model equal to a backbone with its final norm.

    arguments: those of config.json; a stem of given convolutions is an `embed_layer` besides them (`embed_layer_of`).
    names: encoder key -> timm key. tensors: timm's tensors, with the position table at the encoder's image size, and
    zeros for layers of timm's head that the encoder does not have.
    changed: the encoder's tensors that differ from timm's. structure: first_conv, classifier and num_features, as in
    timm's configuration.
    """

    architecture: str
    arguments: dict
    names: dict[str, str]
    tensors: dict[str, Tensor]
    changed: dict[str, Tensor]
    structure: dict


def timm_layout(encoder: Encoder) -> TimmLayout:
    """Return an encoder's backbone in timm's form; raises UserError if no timm model has these tensors."""
    backbone = encoder.backbone
    if is_external(backbone.name):
        raise UserError(
            f"{backbone.name} is no timm model and cannot be exported: share its run folder, which `maskwise.load` "
            f"reads where {VARIABLE}={module_of(backbone.name)} permits the import"
        )
    architecture = backbone.name.partition(".")[0]
    arguments = _arguments(encoder)
    stem = StemOptions.of_network(backbone.timm_args)
    model = build(architecture, arguments if stem is None else {**arguments, "embed_layer": stem.embed_layer()})
    theirs = model.state_dict()
    own = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    names = renaming(own, theirs, backbone)
    tensors = {name: own[key] for key, name in names.items()}
    tensors |= {name: torch.zeros_like(theirs[name], device="cpu") for name in head_tensors(backbone)}
    changed = {}
    if getattr(backbone, "pos_embed", None) is not None:
        table = at_image_size(backbone, encoder.image_size)
        if not torch.equal(table, own["backbone.pos_embed"]):
            changed["backbone.pos_embed"] = own["backbone.pos_embed"]
            tensors["pos_embed"] = table
    mismatch = mismatch_text(theirs.keys() - tensors.keys(), tensors.keys() - theirs.keys())
    shapes = [key for key in theirs.keys() & tensors.keys() if theirs[key].shape != tensors[key].shape]
    if mismatch or shapes:
        raise UserError(
            f"{backbone.name} cannot be written as timm's {architecture}: "
            f"this encoder {mismatch or f'has another shape of {shapes[0]}'}"
        )
    structure = {key: (model.pretrained_cfg or {}).get(key) for key in ("first_conv", "classifier")}
    if stem is not None:
        structure["first_conv"] = f"patch_embed.backbone.{'0.conv' if stem.whiten is None else 'whiten'}"
    return TimmLayout(
        architecture, arguments, names, tensors, changed, {**structure, "num_features": model.num_features}
    )


def build(architecture: str, arguments: dict) -> nn.Module:
    """Build the timm model on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)


OWN_ARGUMENTS = {  # of a Backbone's spec, and none of timm's
    "name",
    "image_size",
    "patch_size",
    "class_token",
    "position",
    "drop_path",
    "mask_token",
    "weights",
    "mean",
    "std",
    "norm_eps",
    *conv_stem.OPTIONS,
}


def _arguments(encoder: Encoder) -> dict:
    """Return timm's arguments for this backbone, without num_classes, which transformers passes itself."""
    backbone = encoder.backbone
    spec = backbone.spec()
    options = {key: value for key, value in spec.items() if key not in OWN_ARGUMENTS}
    if len(encoder.mean) != 3:
        options = {"in_chans": len(encoder.mean), **options}
    if isinstance(backbone, GenericBackbone):
        return generic_arguments(backbone, list(encoder.image_size), options)
    if not isinstance(backbone, TransformerBackbone):
        return feature_map_arguments(backbone, list(encoder.image_size), options)
    pools_class_token = encoder.pooling.needs == {"cls_attention"} and backbone.has_class_token
    pool_norm = "use_fc_norm" if backbone.kind == "Eva" else "fc_norm"
    class_token = {} if spec["class_token"] is None else {"class_token": spec["class_token"]}
    return {
        "img_size": _square_as_int(encoder.image_size),
        "patch_size": _square_as_int(backbone.patch_embed.patch_size),  # of a hybrid in positions of its stem's map
        "dynamic_img_size": True,
        "global_pool": "token" if pools_class_token else "avg",
        pool_norm: False,  # norm before the mean: forward_features returns normalized patches
        **class_token,
        **options,
    }


def feature_map_arguments(backbone, size: list[int], options: dict) -> dict:
    """Return timm's arguments for a feature map backbone; raises UserError for options that timm lacks."""
    options, family = dict(options), backbone.family
    if options.pop("small_stem", False):
        raise UserError(
            f"timm's {backbone.name} has no stem for small images: use the run folder, which `maskwise.load` reads"
        )
    if backbone.timm_args.get("whiten"):
        raise UserError(
            f"timm's {backbone.name} has no whitening of patches: use the run folder, which `maskwise.load` reads"
        )
    if backbone.class_token is False and "class_token" in family.timm_names:
        raise UserError(
            f"timm's {backbone.name} always has a class token: use the run folder, which `maskwise.load` reads, "
            "or train with backbone.class_token=true"
        )
    arguments = {"global_pool": family.timm_pooling}
    if "image_size" in family.timm_names:
        fixed = family.timm_arguments
        arguments["img_size"] = _square_as_int(size)
        arguments |= {key: fixed[key] for key in ("strict_img_size", "head_hidden_size") if key in fixed}
    if backbone.requested_patch_size is not None:
        arguments["patch_size"] = backbone.requested_patch_size
    return {**arguments, **options}


def generic_arguments(backbone: GenericBackbone, size: list[int], options: dict) -> dict:
    """Return timm's arguments for a network that runs as a whole; raises UserError for one that is not timm's."""
    family = backbone.family
    arguments = {key: value for key, value in family.timm_arguments.items() if key not in ("num_classes", *options)}
    if "image_size" in family.timm_names:
        arguments["img_size"] = _square_as_int(size)
    if backbone.requested_patch_size is not None:
        arguments["patch_size"] = backbone.requested_patch_size
    if backbone.class_token is not None and "class_token" in family.timm_names:
        arguments["class_token"] = backbone.class_token
    return {**arguments, **options}


def _square_as_int(size) -> int | list[int]:
    """Return one number for equal height and width, else both."""
    return size[0] if size[0] == size[1] else list(size)


def head_tensors(backbone) -> tuple[str, ...]:
    """Return the keys of layers between timm's last map and its classifier, which an encoder does not have."""
    return backbone.head_tensors if isinstance(backbone, GenericBackbone) else ()


def renaming(own: dict[str, Tensor], theirs: dict[str, Tensor], backbone) -> dict[str, str]:
    """Return encoder key -> timm key for the keys that timm has, without pooling and mask token."""
    home = next((place for place in NORM_PREFIXES if f"{place}weight" in theirs), "norm.")
    if isinstance(backbone, GenericBackbone):
        home = f"{backbone.norm_place}."
    names = {}
    for key in own:
        if key.startswith("norm."):
            names[key] = home + key[len("norm.") :]
        elif key.startswith("backbone.") and key != "backbone.mask_token":
            name = key[len("backbone.") :]
            names[key] = name if name in theirs or not name.startswith("model.") else name[len("model.") :]
    return names


def at_image_size(backbone, image_size: tuple[int, int]) -> Tensor:
    """Return the position table at an image size in timm's shape: [1, P + N, D] with P prefix rows, or [1, D, h, w]."""
    if not isinstance(backbone, TransformerBackbone):
        return backbone.family.position_table(backbone, tuple(image_size)).detach().cpu().contiguous()
    table = backbone.pos_embed.detach().cpu()
    prefix, patches = table.split((backbone.table_prefix, table.shape[1] - backbone.table_prefix), dim=1)
    grid = backbone.grid_for(tuple(image_size))
    return torch.cat(
        [prefix, position_table(patches, backbone.table_grid, grid, backbone.position)], dim=1
    ).contiguous()


def timm_config(layout: TimmLayout, encoder: Encoder, *, tag: str, license: str, filename: str) -> dict:
    """Return the config.json fields that timm reads; missing fields would come from timm's pretrained weights."""
    height, width = encoder.image_size
    data = {
        "tag": tag,
        "license": license,
        "custom_load": False,
        "input_size": [len(encoder.mean), height, width],
        "fixed_input_size": not (layout.arguments.get("dynamic_img_size") or "img_size" not in layout.arguments),
        "interpolation": "bicubic",
        "crop_pct": crop_share(encoder),
        "crop_mode": "center",
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": layout.structure["first_conv"],
        "classifier": layout.structure["classifier"],
    }
    if filename != "model.safetensors":
        data["hf_hub_filename"] = filename
    return {
        "architecture": layout.architecture,
        "num_classes": 0,
        "num_features": layout.structure["num_features"],
        "global_pool": layout.arguments.get("global_pool", "avg"),
        "model_args": layout.arguments,
        "pretrained_cfg": data,
    }


def crop_share(encoder: Encoder) -> float:
    """Return the crop_pct with which timm, which rounds down, resizes to the same side as `Encoder.transform`."""
    side, target = max(encoder.image_size), encoder.transform.resized_size(encoder.image_size)[0]
    if not is_square(encoder) or math.floor(side / encoder.crop_pct) == target:
        return encoder.crop_pct
    return side / (target + 0.5)


def is_square(encoder: Encoder) -> bool:
    """Return whether an encoder's images are as high as wide."""
    return encoder.image_size[0] == encoder.image_size[1]


def tag_of(text: str) -> str:
    """Return a name as a timm tag: letters, digits and underscores."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "maskwise"


def embed_layer_of(folder: Path) -> dict:
    """Return timm's argument `embed_layer` for an exported folder with a stem of given convolutions, else {}.

    config.json holds plain values only, and timm has no name for such a stem; the model card has the same in timm's
    words.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    stem = StemOptions.of_network(config.get("maskwise", {}).get("encoder", {}).get("backbone", {}))
    return {} if stem is None else {"embed_layer": stem.embed_layer()}


def open_timm(folder: Path) -> nn.Module:
    """Open a folder by `timm.create_model("local-dir:...", pretrained=True)`, in eval mode."""
    import logging

    log = logging.getLogger("timm.models._hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about several weights files; the first by name is the right one
    try:
        options = embed_layer_of(folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **options).eval()
    finally:
        log.setLevel(level)

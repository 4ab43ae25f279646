"""An encoder's backbone as timm knows it: architecture, arguments, tensors, and the configuration file that timm reads."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn.backbone import mismatch, timm
from maskwise.nn.encoder import Encoder
from maskwise.nn.timm_models import ANATOMIES
from maskwise.nn.transformer import TransformerBackbone

NORMS = ("norm.", "head.norm.", "fc_norm.")  # where a timm model keeps its last norm


@dataclass(frozen=True)
class TimmLayout:
    """What makes a timm model equal to a backbone and its final norm.

    `names` maps the encoder's key to timm's; `tensors` are timm's own, with the position table at the encoder's image
    size; `changed` holds the encoder's tensors that differ from these and must be kept beside them.
    """

    architecture: str
    arguments: dict
    names: dict[str, str]
    tensors: dict[str, Tensor]
    changed: dict[str, Tensor]
    about: dict  # what timm says of the structure: first_conv, classifier, num_features


def timm_layout(encoder: Encoder) -> TimmLayout:
    """An encoder's backbone in timm's terms; raises UserError where no timm model has these tensors."""
    backbone = encoder.backbone
    architecture = backbone.name.partition(".")[0]
    arguments = _arguments(encoder)
    model = build(architecture, arguments)
    theirs = model.state_dict()
    own = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    names = renaming(own, theirs)
    tensors = {name: own[key] for key, name in names.items()}
    changed = {}
    if getattr(backbone, "pos_embed", None) is not None:
        table = at_image_size(backbone, encoder.image_size)
        if not torch.equal(table, own["backbone.pos_embed"]):
            changed["backbone.pos_embed"] = own["backbone.pos_embed"]
            tensors["pos_embed"] = table
    wrong = mismatch(theirs.keys() - tensors.keys(), tensors.keys() - theirs.keys())
    shapes = [key for key in theirs.keys() & tensors.keys() if theirs[key].shape != tensors[key].shape]
    if wrong or shapes:
        raise UserError(f"{backbone.name} cannot be written as timm's {architecture}: this encoder {wrong or f'has another shape of {shapes[0]}'}")
    structure = {key: (model.pretrained_cfg or {}).get(key) for key in ("first_conv", "classifier")}
    return TimmLayout(architecture, arguments, names, tensors, changed, {**structure, "num_features": model.num_features})


def build(architecture: str, arguments: dict) -> nn.Module:
    """The timm model without memory, to compare names and shapes with."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)


def _arguments(encoder: Encoder) -> dict:
    """timm's arguments for this backbone; without num_classes, which transformers passes by itself."""
    backbone, size = encoder.backbone, list(encoder.image_size)
    spec = backbone.spec()
    ours = ("name", "image_size", "patch_size", "class_token", "position", "drop_path", "mask_token", "weights", "mean", "std")
    own = {key: value for key, value in spec.items() if key not in ours}
    if not isinstance(backbone, TransformerBackbone):
        return map_arguments(backbone, size, own, len(encoder.mean))
    patch, channels = backbone.patch_size, len(encoder.mean)
    return {
        "img_size": size[0] if size[0] == size[1] else size,
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "dynamic_img_size": True,
        "global_pool": "token" if getattr(encoder.pooling, "needs", None) == {"cls_attention"} and backbone.has_class_token else "avg",
        ("use_fc_norm" if backbone.kind == "Eva" else "fc_norm"): False,  # the norm stands before the mean: forward_features gives normalised patches
        **({} if spec["class_token"] is None else {"class_token": spec["class_token"]}),
        **({} if channels == 3 else {"in_chans": channels}),
        **own,
    }


def map_arguments(backbone, size: list[int], own: dict, channels: int) -> dict:
    """timm's arguments for a backbone of maps; raises UserError for what timm has no argument for."""
    if own.pop("small_stem", False):
        raise UserError(f"timm's {backbone.name} has no stem for small images: keep the run folder, which `maskwise.load` reads")
    anatomy = ANATOMIES[backbone.kind]
    if backbone.class_token is False and "class_token" in anatomy.TAKES:
        raise UserError(f"timm's {backbone.name} always has a class token: keep the run folder, which `maskwise.load` reads, or train with backbone.class_token=true")
    free = {key: anatomy.PLAIN[key] for key in ("strict_img_size", "head_hidden_size") if key in anatomy.PLAIN}
    return {
        "global_pool": getattr(anatomy, "POOL", "avg"),
        **({"img_size": size[0] if size[0] == size[1] else size, **free} if "image_size" in anatomy.TAKES else {}),
        **({} if backbone.asked_patch is None else {"patch_size": backbone.asked_patch}),
        **({} if channels == 3 else {"in_chans": channels}),
        **own,
    }


def renaming(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, str]:
    """The encoder's keys that timm has, with timm's names; pooling and mask token stay out."""
    home = next((place for place in NORMS if f"{place}weight" in theirs), "norm.")
    names = {}
    for key in own:
        if key.startswith("norm."):
            names[key] = home + key[len("norm.") :]
        elif key.startswith("backbone.") and key != "backbone.mask_token":
            name = key[len("backbone.") :]
            names[key] = name if name in theirs or not name.startswith("model.") else name[len("model.") :]
    return names


def at_image_size(backbone, image_size: tuple[int, int]) -> Tensor:
    """The position table that this backbone adds at that image size, as timm keeps it: [1, P + N, D] with prefix rows, a PiT's [1, D, h, w]."""
    if not isinstance(backbone, TransformerBackbone):
        return ANATOMIES[backbone.kind].table_for(backbone, tuple(image_size)).detach().cpu().contiguous()
    table = backbone.pos_embed.detach().cpu()
    prefix, patches = table.split((backbone.table_prefix, table.shape[1] - backbone.table_prefix), dim=1)
    grid = backbone.grid_for(tuple(image_size))
    return torch.cat([prefix, position_table(patches, backbone.table_grid, grid, backbone.position)], dim=1).contiguous()


def timm_config(layout: TimmLayout, encoder: Encoder, *, tag: str, licence: str, filename: str) -> dict:
    """The fields of config.json that timm reads; every field that timm would else inherit from its own weights is said."""
    height, width = encoder.image_size
    data = {
        "tag": tag,
        "license": licence,
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
        "first_conv": layout.about["first_conv"],
        "classifier": layout.about["classifier"],
    }
    if filename != "model.safetensors":
        data["hf_hub_filename"] = filename
    return {
        "architecture": layout.architecture,
        "num_classes": 0,
        "num_features": layout.about["num_features"],
        "global_pool": layout.arguments["global_pool"],
        "model_args": layout.arguments,
        "pretrained_cfg": data,
    }


def resized_to(encoder: Encoder) -> int:
    """Pixels of the short side before the centre crop."""
    return round(max(encoder.image_size) / encoder.crop_pct)


def crop_share(encoder: Encoder) -> float:
    """The crop_pct with which timm, which rounds down, resizes to the same side as `Encoder.transform`, which rounds."""
    side, target = max(encoder.image_size), resized_to(encoder)
    return encoder.crop_pct if math.floor(side / encoder.crop_pct) == target else side / (target + 0.5)


def tag_of(text: str) -> str:
    """A name as a timm tag: letters, digits and underscores."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "maskwise"


def open_timm(folder: Path) -> nn.Module:
    """The folder's model as `timm.create_model("local-dir:...", pretrained=True)` gives it, in eval mode."""
    import logging

    log = logging.getLogger("timm.models._hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it says that it chose among several files; it chose the first by name, as meant
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    finally:
        log.setLevel(level)

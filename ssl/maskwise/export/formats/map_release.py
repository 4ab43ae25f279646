"""Released MAP files: backbones, multi-token attention pooling heads and classifiers under the reference's key names.

The key names are those of the public source (Lab-LVM/imagenet-models, MAP/models/map.py); no released file was
available to test with.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.export.formats.dino_convnets import blocks_per_stage
from maskwise.export.formats.saved_classifier import SavedClassifier
from maskwise.export.formats.spec_checks import user_errors
from maskwise.nn.classifiers import CLASSIFIERS

BP_INDEX = "gram_token_extraction.bp_index"  # buffer: flat indices of the Gram matrix's upper triangle
PREFIXES = ("head.", "fc.")
KEY_PREFIXES = (  # beginning of a released key and of ours; {} is a group, or a token of a group
    ("mmcap.multi_scale.concat_conv.", "fuse.join."),
    ("mmcap.channel_convertor.", "fuse.join."),
    ("mmcap.mmcap.{}.gram_token_extraction.ch_reduction.", "map.groups.{}.source.reduce."),
    ("mmcap.mmcap.{}.gram_token_extraction.bp_reduction.", "map.groups.{}.source.expand."),
    ("mmcap.mmcap.{}.x_cls", "map.groups.{}.source.token"),
    ("mmcap.mmcap.{}.attention.0.attn.w1.", "map.groups.{}.block.attention.before."),
    ("mmcap.mmcap.{}.attention.0.attn.w2.", "map.groups.{}.block.attention.after."),
    ("mmcap.mmcap.{}.attention.0.attn.", "map.groups.{}.block.attention."),
    ("mmcap.mmcap.{}.attention.0.", "map.groups.{}.block."),
    ("heads.{}.norm.{}.", "heads.{}.norms.{}."),
    ("heads.{}.head.{}.", "heads.{}.heads.{}."),
    ("heads.{}.norm.", "heads.{}.norm."),
    ("heads.{}.head.", "heads.{}.head."),
    ("heads.{}.", "heads.{}.head."),  # a plain linear layer
    ("self_dt_heads.{}.", "averaged_heads.{}."),
)
FAMILY_KEYS = {  # a key found in one family only
    "mobilenet": "layers.0.1.3.weight",
    "maxvit": "stages.0.blocks.0.attn_block.norm1.weight",
}
MOBILENET_LAYERS = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}  # of a block


def family(state: dict[str, Tensor]) -> str | None:
    """Return "mobilenet" or "maxvit" for a backbone of that family; None for another."""
    return next((name for name, key in FAMILY_KEYS.items() if key in state), None)


def backbone_key(key: str, kind: str) -> str:
    """Rename a released backbone key to timm's."""
    if kind != "mobilenet":
        return key
    key = re.sub(r"^layers\.0\.0\.([01])\.", lambda match: ("conv_stem.", "bn1.")[int(match[1])], key)
    key = re.sub(r"^layers\.0\.1\.", "layers.0.0.", key)
    return re.sub(
        r"^layers\.(\d+)\.(\d+)\.([0134])\.",
        lambda match: f"blocks.{match[1]}.{match[2]}.{MOBILENET_LAYERS[match[3]]}.",
        key,
    )


def mobilenet(state: dict[str, Tensor]) -> dict:
    """Return the arguments of MobileNet V1; the reference uses ReLU, timm ReLU6."""
    return {"name": "mobilenetv1_100", "image_size": [224, 224], "act_layer": "relu"}


def maxvit(state: dict[str, Tensor]) -> dict:
    """Infer the arguments of a MaxViT; the reference uses the exact GELU, and windows of image size / 32."""
    depths = blocks_per_stage(state, r"stages\.(\d+)\.blocks\.(\d+)\.conv\.conv1_1x1\.weight")
    side = 32 * ((state["stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table"].shape[-1] + 1) // 2)
    return {
        "name": "maxvit_tiny_tf_224",
        "image_size": [side, side],
        "depths": depths,
        "stem_width": state["stem.conv1.weight"].shape[0],
        "embed_dim": [state[f"stages.{i}.blocks.0.conv.conv3_1x1.weight"].shape[0] for i in range(len(depths))],
        "conv_act_layer": "gelu",
        "transformer_act_layer": "gelu",
    }


FAMILIES = {"mobilenet": mobilenet, "maxvit": maxvit}


def fill_norm(state: dict[str, Tensor], kind: str) -> list[str]:
    """Add the final norm that MAP's ConvNeXt and MaxViT lack, with weight 1 and bias 0; return what was added."""
    norms = {
        "convnext": r"stages\.\d+\.blocks\.0\.conv_dw\.bias",
        "maxvit": r"stages\.\d+\.blocks\.0\.attn_grid\.norm1\.weight",
    }
    if "norm.weight" in state or kind not in norms:
        return []
    widths = [value.shape[0] for key, value in state.items() if re.fullmatch(norms[kind], key)]
    if not widths:
        return []
    state["norm.weight"], state["norm.bias"] = torch.ones(widths[-1]), torch.zeros(widths[-1])
    return ["norm.weight and norm.bias (MAP reads no final norm: 1 and 0)"]


def head_key(key: str, back: bool = False) -> str | None:
    """Rename a released head key to ours, or with `back` ours to the released one; None for an unknown key."""
    for pair in KEY_PREFIXES:
        start, end = pair[::-1] if back else pair
        match = re.match(re.escape(start).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return end.format(*match.groups()) + key[match.end() :]
    return None


def take_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the tensors of a MAP head out of `state`, under their released keys; {} without one."""
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(f"{prefix}mmcap.") for key in state)), None)
    return {} if prefix is None else {key: state.pop(key) for key in list(state) if key.startswith(prefix)}


def read(
    head: dict[str, Tensor], encoder: nn.Module, path: Path, overrides: dict
) -> tuple[SavedClassifier, list[str], list[str]]:
    """Read a released head as a classifier of `encoder`, which may be on the meta device.

    Returns the classifier, the keys of index buffers, and notes on settings not stored in the tensors.
    Raises UserError, naming a key of the file, for an unknown, missing or misshapen tensor.
    """
    prefix = next(iter(head)).partition(".")[0] + "."
    index = [key for key in head if key.endswith(BP_INDEX)]
    state, released = _renamed_head(head, prefix, index, path)
    incomplete = "its MAP head is incomplete"
    try:
        options, count, notes = infer_options(
            {key.removeprefix("head."): value for key, value in state.items()},
            any("multi_scale" in key for key in head),
            overrides,
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {prefix}{head_key(error.args[0], back=True)}: {incomplete}") from None
    for key in index:
        check_index(head[key], options["gram_width"], key, path)
    with user_errors(path), torch.device("meta"):
        own = CLASSIFIERS["map"](encoder, count, **options).state_dict()
    for key, value in state.items():
        if key not in own:
            raise UserError(f"{path}: {released[key]} has no counterpart in this project's MAP classifier")
        if value.shape != own[key].shape:
            raise UserError(
                f"{path}: {released[key]} is {list(head[released[key]].shape)} there and {list(own[key].shape)} here: "
                "the parts of the head do not fit each other or this network"
            )
    for key in own:
        if key not in state:
            raise UserError(f"{path} lacks {prefix}{head_key(key.removeprefix('head.'), back=True)}: {incomplete}")
    return SavedClassifier(str(path), "map", options, count, None, state), index, notes


def _renamed_head(
    head: dict[str, Tensor], prefix: str, index: list[str], path: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the head under our keys, and our key -> released key."""
    state, released = {}, {}
    for key, value in head.items():
        if key in index:
            continue
        ours = head_key(key[len(prefix) :])
        if ours is None:
            raise UserError(
                f"{path}: {key} has no counterpart in this project's MAP classifier; "
                "if it is another name of a known part, rename it with alias=THEIRS=OURS"
            )
        is_conv = ".mlp.fc" in ours and value.ndim == 4
        state[f"head.{ours}"] = value.flatten(2) if is_conv else value
        released[f"head.{ours}"] = key
    return state, released


def check_index(index: Tensor, width: int, key: str, path: Path) -> None:
    """Raise UserError unless the indices are the upper triangle of a width x width matrix, row by row."""
    rows, columns = torch.triu_indices(width, width, device=index.device)
    if not torch.equal(index.flatten(), rows * width + columns):
        raise UserError(
            f"{path}: {key} is not the upper triangle of a matrix {width} wide, row by row: "
            "this version of MAP is not supported"
        )


def infer_options(state: dict[str, Tensor], several: bool, overrides: dict) -> tuple[dict, int, list[str]]:
    """Infer the MAPClassifier arguments from tensors of a head over `several` stages or the last one.

    Returns the arguments, the number of classes, and notes on settings not stored in the tensors.
    Raises KeyError for a missing tensor.
    """
    first = "map.groups.0."
    gram = any(key.startswith(f"{first}source.reduce.") for key in state)
    dim, embed = state[f"{first}block.norm1.weight"].shape[0], state[f"{first}block.attention.q.weight"].shape[0]
    hidden, inside = state[f"{first}block.mlp.fc1.weight"].shape[:2]
    light = not any(key.startswith("heads.") for key in state)
    split = "heads.0.norms.0.weight" in state or "heads.0.heads.0.weight" in state
    averages = any(key.startswith("averaged_heads.") for key in state)
    talking = f"{first}block.attention.before.weight" in state
    default_heads = max(1, dim // 32)
    if talking:
        heads = state[f"{first}block.attention.before.weight"].shape[0]
    else:
        heads = overrides.get("pooling_heads", default_heads)
    options = {
        "layers": None if several else [-1],
        "dim": dim,
        "groups": 1 + max(int(key.split(".")[2]) for key in state if key.startswith("map.groups.")),
        "gram": gram,
        "embed": embed,
        "heads": heads,
        "talking": talking,
        "average": "mean" if averages else None,
        "mlp_ratio": hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim,
        "mlp_groups": dim // inside,
        "head": "split" if split else "joint",
        "norm": light or split or "heads.0.norm.weight" in state,
        "light": light,
    }
    if gram:
        width, expand = state[f"{first}source.reduce.0.weight"].shape[0], state[f"{first}source.expand.0.weight"]
        options |= {
            "tokens": expand.shape[0] // dim,
            "gram_width": width,
            "gram_groups": width * (width + 1) // 2 // expand.shape[1],
        }
    else:
        options["tokens"] = state[f"{first}source.token"].shape[1]
    guess = f"{default_heads} attention heads are a guess (else pooling_heads=), "
    assumed = "resampling, the grid of the last stage but one, and keys from tokens and pixels follow the reference"
    is_known = talking or "pooling_heads" in overrides
    return options, num_classes(state, light, split), [f"not stored in the file: {'' if is_known else guess}{assumed}"]


def num_classes(state: dict[str, Tensor], light: bool, split: bool) -> int:
    """Return the number of classes; raises KeyError for a missing tensor."""
    if light:
        return state["averaged_heads.0.head.bias"].shape[0]
    return state["heads.0.heads.0.bias" if split else "heads.0.head.bias"].shape[0]

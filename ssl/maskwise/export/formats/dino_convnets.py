"""ResNets, ConvNeXts and Swins in DINO-family files, under torchvision's, Meta's, Microsoft's and timm's key names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from maskwise.errors import UserError

FAMILY_KEYS = {  # a key found in one family only
    "resnet": ("layer1.0.conv1.weight",),
    "convnext": ("downsample_layers.0.0.weight", "stem.0.weight"),
    "swin": ("layers.0.blocks.0.attn.relative_position_bias_table",),
}
IMAGE_SIZE = [224, 224]  # of the published trainings; not stored in any tensor


def family(state: dict[str, Tensor]) -> str | None:
    """Return the family of a state dict; None for a transformer or an unknown network."""
    return next((name for name, keys in FAMILY_KEYS.items() if any(key in state for key in keys)), None)


def renamed(state: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a state dict to timm's keys, the last norm to `norm.`; also return the unused keys.

    Unused are index buffers, attention masks and the norms of auxiliary batch statistics.
    """
    tensors, unused = {}, []
    # Microsoft's Swin merges patches at the end of a stage, timm's at the start of the next one
    merges_last = kind == "swin" and "layers.0.downsample.reduction.weight" in state
    for key, value in state.items():
        if "aux_bn." in key or key.endswith(("relative_position_index", "attn_mask")):
            unused.append(key)
            continue
        if kind == "convnext":
            key, value = convnext_key(key), value.flatten() if ".grn." in key else value
        elif merges_last:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key)
        tensors[key] = value
    return tensors, unused


def convnext_key(key: str) -> str:
    """Rename a ConvNeXt key of Meta's code to timm's."""
    key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
    key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    for theirs, ours in (
        (".dwconv.", ".conv_dw."),
        (".pwconv", ".mlp.fc"),
        (".grn.gamma", ".mlp.grn.weight"),
        (".grn.beta", ".mlp.grn.bias"),
    ):
        key = key.replace(theirs, ours)
    return "norm." + key.removeprefix("head.norm.") if key.startswith("head.norm.") else key


def backbone_arguments(
    state: dict[str, Tensor], kind: str, path: Path, more_families: dict[str, Callable[[dict], dict]]
) -> dict:
    """Infer the Backbone arguments from tensor shapes; raises UserError if they do not fit the family.

    `more_families` adds families to those of this module: name -> function of the state dict.
    """
    readers = {"resnet": resnet, "convnext": convnext, "swin": swin, **more_families}
    try:
        return readers[kind](state)
    except (KeyError, ZeroDivisionError, ValueError) as error:
        raise UserError(f"{path} is not a supported {kind}: it lacks {error}") from None


def blocks_per_stage(state: dict[str, Tensor], pattern: str) -> list[int]:
    """Count the blocks of each stage; the groups of `pattern` are stage and block."""
    blocks = {(int(match[1]), int(match[2])) for key in state if (match := re.match(pattern, key))}
    return [sum(stage == other for other, _ in blocks) for stage in sorted({stage for stage, _ in blocks})]


def resnet(state: dict[str, Tensor]) -> dict:
    """Infer the arguments of a ResNet of basic or bottleneck blocks, ResNeXt and wide ones included."""
    layers = blocks_per_stage(state, r"layer(\d+)\.(\d+)\.conv1\.weight")
    bottleneck = "layer1.0.conv3.weight" in state
    last, expansion = ("conv3", 4) if bottleneck else ("conv2", 1)
    channels = [state[f"layer{i + 1}.0.{last}.weight"].shape[0] // expansion for i in range(len(layers))]
    out, inside = state["layer1.0.conv2.weight"].shape[:2]
    groups = out // inside if bottleneck else 1
    base_width = out * 64 // (channels[0] * groups) if bottleneck else 64
    return {
        "name": "resnet50" if bottleneck else "resnet18",
        "image_size": IMAGE_SIZE,
        "layers": layers,
        "channels": channels,
        **({"small_stem": True} if state["conv1.weight"].shape[-1] == 3 else {}),
        **({"cardinality": groups, "base_width": base_width} if (groups, base_width) != (1, 64) else {}),
    }


def convnext(state: dict[str, Tensor]) -> dict:
    """Infer the arguments of a ConvNeXt; V2 if its blocks have global response normalization."""
    depths = blocks_per_stage(state, r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight")
    has_grn = "stages.0.blocks.0.mlp.grn.weight" in state
    return {
        "name": "convnextv2_tiny" if has_grn else "convnext_small",
        "image_size": IMAGE_SIZE,
        "patch_size": state["stem.0.weight"].shape[-1],
        "depths": depths,
        "dims": [state[f"stages.{i}.blocks.0.conv_dw.weight"].shape[0] for i in range(len(depths))],
    }


def swin(state: dict[str, Tensor]) -> dict:
    """Infer the arguments of a Swin Transformer; the window size is that of the first stage."""
    depths = blocks_per_stage(state, r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight")
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
    return {
        "name": "swin_tiny_patch4_window7_224",
        "image_size": IMAGE_SIZE,
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "depths": depths,
        "embed_dim": state["patch_embed.proj.weight"].shape[0],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
    }

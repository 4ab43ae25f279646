"""ResNets, ConvNeXts and Swins in the DINO family's files: torchvision's names, Meta's, Microsoft's and timm's (pooling.md 6, attmask.md 6)."""

from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor

from maskwise.functional.errors import UserError

MARKS = {  # a key that each family has and no other
    "resnet": ("layer1.0.conv1.weight",),
    "convnext": ("downsample_layers.0.0.weight", "stem.0.weight"),
    "swin": ("layers.0.blocks.0.attn.relative_position_bias_table",),
}
ANY_SIZE = [224, 224]  # what these networks were trained at; no tensor tells


def family(state: dict[str, Tensor]) -> str | None:
    """The family that a state dict is of; None for a transformer or something else."""
    return next((name for name, keys in MARKS.items() if any(key in state for key in keys)), None)


def renamed(state: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under timm's names, the last norm as `norm.`; and the keys that hold nothing learned or are of no use."""
    kept, left = {}, []
    merged_last = "layers.0.downsample.reduction.weight" in state  # the original Swin merges at the end of a stage, timm at the start of the next
    for key, value in state.items():
        if "aux_bn." in key or key.endswith(("relative_position_index", "attn_mask")):
            left.append(key)
            continue
        if kind == "convnext":
            key, value = convnext_key(key), value.flatten() if ".grn." in key else value
        elif kind == "swin" and merged_last:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", key)
        kept[key] = value
    return kept, left


def convnext_key(key: str) -> str:
    """Meta's name of a ConvNeXt's tensor as timm's."""
    key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
    key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    for theirs, ours in ((".dwconv.", ".conv_dw."), (".pwconv", ".mlp.fc"), (".grn.gamma", ".mlp.grn.weight"), (".grn.beta", ".mlp.grn.bias")):
        key = key.replace(theirs, ours)
    return "norm." + key.removeprefix("head.norm.") if key.startswith("head.norm.") else key


def backbone_of(state: dict[str, Tensor], kind: str, path: Path, further: dict) -> dict:
    """The arguments of a Backbone with these shapes, by a function here or of the table of `further` ones; raises UserError where they are not those of the family."""
    try:
        return {"resnet": resnet, "convnext": convnext, "swin": swin, **further}[kind](state)
    except (KeyError, ZeroDivisionError, ValueError) as error:
        raise UserError(f"{path} is not a {kind} of a shape that is known here: it lacks {error}") from None


def counted(state: dict[str, Tensor], pattern: str) -> list[int]:
    """How many blocks each stage has; `pattern` finds stage and block."""
    places = {(int(found[1]), int(found[2])) for key in state if (found := re.match(pattern, key))}
    return [sum(stage == each for stage, _ in places) for each in sorted({stage for stage, _ in places})]


def resnet(state: dict[str, Tensor]) -> dict:
    """A ResNet of basic or bottleneck blocks, its widths and groups read off."""
    layers = counted(state, r"layer(\d+)\.(\d+)\.conv1\.weight")
    deep = "layer1.0.conv3.weight" in state
    last = "conv3" if deep else "conv2"
    channels = [state[f"layer{i + 1}.0.{last}.weight"].shape[0] // (4 if deep else 1) for i in range(len(layers))]
    out, inside = state["layer1.0.conv2.weight"].shape[:2]
    groups = out // inside if deep else 1
    wide = out * 64 // (channels[0] * groups) if deep else 64
    return {
        "name": "resnet50" if deep else "resnet18", "image_size": ANY_SIZE, "layers": layers, "channels": channels,
        **({"small_stem": True} if state["conv1.weight"].shape[-1] == 3 else {}),
        **({"cardinality": groups, "base_width": wide} if (groups, wide) != (1, 64) else {}),
    }  # fmt: skip


def convnext(state: dict[str, Tensor]) -> dict:
    """A ConvNeXt, V2 where its blocks have a global response norm."""
    depths = counted(state, r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight")
    second = "stages.0.blocks.0.mlp.grn.weight" in state
    return {
        "name": "convnextv2_tiny" if second else "convnext_small", "image_size": ANY_SIZE, "patch_size": state["stem.0.weight"].shape[-1], "depths": depths,
        "dims": [state[f"stages.{i}.blocks.0.conv_dw.weight"].shape[0] for i in range(len(depths))],
    }  # fmt: skip


def swin(state: dict[str, Tensor]) -> dict:
    """A Swin Transformer; its window is that of the first stage."""
    depths = counted(state, r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight")
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
    return {
        "name": "swin_tiny_patch4_window7_224", "image_size": ANY_SIZE, "patch_size": state["patch_embed.proj.weight"].shape[-1], "depths": depths,
        "embed_dim": state["patch_embed.proj.weight"].shape[0], "num_heads": [table.shape[1] for table in tables],
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
    }  # fmt: skip

"""The networks under released MAP heads that no other research file has: MobileNet V1 and MaxViT, in the reference's names (its models/map_*.py)."""

from __future__ import annotations

import re

from torch import Tensor

from maskwise.export.map_files import counted

MARKS = {  # a key that each has and no other
    "mobilenet": "layers.0.1.3.weight",
    "maxvit": "stages.0.blocks.0.attn_block.norm1.weight",
}
STEPS = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}  # of a MobileNet's block


def family(state: dict[str, Tensor]) -> str | None:
    """Which of MARKS a state dict is of; None for another."""
    return next((name for name, key in MARKS.items() if key in state), None)


def renamed(key: str, kind: str) -> str:
    """A name there as timm's."""
    if kind == "mobilenet":
        key = re.sub(r"^layers\.0\.0\.([01])\.", lambda found: ("conv_stem.", "bn1.")[int(found[1])], key)
        key = re.sub(r"^layers\.0\.1\.", "layers.0.0.", key)
        return re.sub(r"^layers\.(\d+)\.(\d+)\.([0134])\.", lambda found: f"blocks.{found[1]}.{found[2]}.{STEPS[found[3]]}.", key)
    return key


def mobilenet(state: dict[str, Tensor]) -> dict:
    """MobileNet V1, with the reference's ReLU where timm's has a ReLU6."""
    return {"name": "mobilenetv1_100", "image_size": [224, 224], "act_layer": "relu"}


def maxvit(state: dict[str, Tensor]) -> dict:
    """A MaxViT with the reference's GELU where timm's has its approximation by tanh; windows are a 32nd of the image."""
    depths = counted(state, r"stages\.(\d+)\.blocks\.(\d+)\.conv\.conv1_1x1\.weight")
    side = 32 * ((state["stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table"].shape[-1] + 1) // 2)
    return {
        "name": "maxvit_tiny_tf_224", "image_size": [side, side], "depths": depths, "stem_width": state["stem.conv1.weight"].shape[0],
        "embed_dim": [state[f"stages.{i}.blocks.0.conv.conv3_1x1.weight"].shape[0] for i in range(len(depths))],
        "conv_act_layer": "gelu", "transformer_act_layer": "gelu",
    }  # fmt: skip


def last_width(state: dict[str, Tensor], kind: str) -> int | None:
    """The width of the final norm that MAP's network lacks, None where timm's has none either; names are timm's."""
    norms = {"convnext": r"stages\.\d+\.blocks\.0\.conv_dw\.bias", "maxvit": r"stages\.\d+\.blocks\.0\.attn_grid\.norm1\.weight"}
    found = [value.shape[0] for key, value in state.items() if kind in norms and re.fullmatch(norms[kind], key)]
    return found[-1] if found else None


SHAPES = {"mobilenet": mobilenet, "maxvit": maxvit}

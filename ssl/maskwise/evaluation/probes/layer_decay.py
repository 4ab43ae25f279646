"""Parameter groups whose learning rate falls from the head to the patch embedding."""

from __future__ import annotations

import re

from torch import nn

from maskwise.errors import UserError

FIRST = ("cls_token", "reg_token", "pos_embed", "mask_token", "patch_embed", "norm_pre")
NEVER_DECAYED = ("cls_token", "reg_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer: 0 tokens, positions and patches, i + 1 block i, depth + 1 the rest."""
    inside = name.partition("backbone.")[2]
    if inside.split(".")[0] in FIRST:
        return 0
    block = re.match(r"blocks\.(\d+)\.", inside)
    return int(block[1]) + 1 if block else depth + 1


def layer_groups(model: nn.Module, depth: int | None, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Return optimizer groups of the trainable parameters: params, names, weight_decay, lr_scale, layer.

    lr_scale = layer_decay^(depth + 1 - layer). 1-D tensors, biases, class token and positions are not decayed (BEiT,
    DeiT). depth: blocks of the backbone, None for one without blocks, which takes layer_decay 1 only. Raises UserError
    otherwise.
    """
    if layer_decay != 1 and depth is None:
        raise UserError("layer_decay needs a backbone of blocks; give layer_decay=1")
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = 0 if depth is None else layer_of(name, depth)
        plain = parameter.ndim == 1 or name.endswith(".bias") or name.split(".")[-1] in NEVER_DECAYED
        scale = 1.0 if depth is None else layer_decay ** (depth + 1 - layer)
        group = groups.setdefault(
            (layer, plain),
            {
                "params": [],
                "names": [],
                "weight_decay": 0.0 if plain else weight_decay,
                "lr_scale": scale,
                "layer": layer,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]

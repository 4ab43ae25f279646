"""timm's EfficientNet file, MobileNets V1 and V2 with it, as the backbone runs it: steps of a block, stages by their resolution."""

from __future__ import annotations

import math

from timm.models import _efficientnet_blocks as timms
from timm.models import efficientnet
from torch import Tensor, nn

CLASS = efficientnet.EfficientNet
STEPS = {  # what a block's branch is made of, in order
    timms.ConvBnAct: ("conv", "bn1", "aa"),
    timms.DepthwiseSeparableConv: ("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"),
    timms.InvertedResidual: ("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3"),
    timms.EdgeResidual: ("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2"),
}
BLOCKS = tuple(STEPS)
MAPS = True
TAKES: dict[str, str] = {}
NAMED = {"block_args", "num_features", "stem_size", "fix_stem", "round_chs_fn", "se_layer"}  # what timm's names settle
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0}
CLASSIFIER = ("classifier.",)
MASKS = False
SHALLOW: dict[str, int] = {}


def translate(state: dict, model: nn.Module) -> dict:
    """timm's names are the only ones."""
    return state


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return [block for stack in model.blocks for block in stack]


def stages(model: nn.Module) -> list:
    """The blocks of each resolution, of which the stem's is the first: stacks are joined until one halves the map."""
    found: list[list] = []
    for stack in model.blocks:
        if not found or math.prod(map(stride, stack)) > 1:
            found.append([])
        found[-1].extend(stack)
    return found


def steps(block: nn.Module) -> list:
    """The layers of a block's branch, in order."""
    return [layer for name in STEPS[type(block)] if (layer := getattr(block, name, None)) is not None]


def stride(block: nn.Module) -> int:
    """By what a block makes a map smaller."""
    layers = (next(iter(layer.values())) if isinstance(layer, nn.ModuleDict) else layer for layer in steps(block))  # convolutions of several sizes side by side
    found = (getattr(layer, "stride", 1) for layer in layers)
    return math.prod(each if isinstance(each, int) else each[0] for each in found)


def width(block: nn.Module) -> int:
    """Channels after a block."""
    return [layer.out_channels for layer in steps(block) if hasattr(layer, "out_channels")][-1]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to keep, by timm's names, and the final norm, of which there is none."""
    return {**{name: getattr(model, name) for name in ("conv_stem", "bn1", "blocks", "conv_head", "bn2")}, "norm": nn.Identity()}


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after each stage, the last with the convolution behind it."""
    found = [model.conv_stem.out_channels, *(width(stage[-1]) for stage in stages(model))]
    return found if isinstance(model.conv_head, nn.Identity) else [*found[:-1], model.conv_head.out_channels]


def strides(model: nn.Module) -> tuple[int, int]:
    """Pixels of the stem's patch, or 1, and the total stride."""
    return 1, model.conv_stem.stride[0] * math.prod(map(stride, blocks(model)))


def grid(side: int, patch: int, total: int) -> int:
    """Places along a side of so many pixels: every halving rounds up."""
    return -(-side // total)


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of: average pooling against aliasing rounds down."""
    return strides(model)[1] if any(isinstance(getattr(block, "aa", None), nn.AvgPool2d) for block in blocks(model)) else 1


def stem(model: nn.Module, images: Tensor) -> Tensor:
    """Images [B, C, H, W] -> the stem's map."""
    return model.bn1(model.conv_stem(images))


def enter(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """Nothing stands before a stage's blocks."""
    return x


def leave(model: nn.Module, x: Tensor) -> Tensor:
    """What stands behind the last stage's blocks."""
    return model.bn2(model.conv_head(x))


def pass_block(block: nn.Module, x: Tensor, scale: Tensor | None, cache: dict) -> Tensor:
    """A block of x [B, C, H, W]; scale [2, B, 1, 1], of which the first row scales its one branch where there is a shortcut."""
    shortcut = x
    for layer in steps(block):
        x = layer(x)
    if not block.has_skip:
        return x
    return (x if scale is None else x * scale[0].unsqueeze(-1)) + shortcut


def to_map(x: Tensor) -> Tensor:
    """A stage's output as [B, C, H, W]."""
    return x

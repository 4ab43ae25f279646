"""timm's EfficientNet, MobileNet V1 and V2 included: blocks as lists of layers, stages by resolution."""

from __future__ import annotations

import math

from timm.models import _efficientnet_blocks as timm_blocks
from timm.models import efficientnet
from torch import Tensor, nn

from maskwise.nn.backbones.families.base import FeatureMapFamily, scale_residual

# layers of each block's residual branch, in order
BRANCH_LAYERS = {
    timm_blocks.ConvBnAct: "conv bn1 aa",
    timm_blocks.DepthwiseSeparableConv: "conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2",
    timm_blocks.InvertedResidual: "conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3",
    timm_blocks.EdgeResidual: "conv_exp bn1 aa se conv_pwl bn2",
}


class EfficientNetFamily(FeatureMapFamily):
    """timm's EfficientNet; a stage is all blocks of one resolution, the stem's included."""

    model_class = efficientnet.EfficientNet
    channels_last = True
    block_classes = tuple(BRANCH_LAYERS)
    set_by_name = frozenset({"block_args", "num_features", "stem_size", "fix_stem", "round_chs_fn", "se_layer"})
    classifier_prefixes = ("classifier.",)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the residual blocks in order, of any class."""
        return [block for stack in model.blocks for block in stack]

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of each resolution: stacks are joined until one downsamples."""
        stages: list[list] = []
        for stack in model.blocks:
            if not stages or math.prod(map(block_stride, stack)) > 1:
                stages.append([])
            stages[-1].extend(stack)
        return stages

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a backbone adopts; there is no final norm."""
        names = ("conv_stem", "bn1", "blocks", "conv_head", "bn2")
        return {**{name: getattr(model, name) for name in names}, "norm": nn.Identity()}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage, the last with the head's convolution."""
        widths = [model.conv_stem.out_channels, *(out_channels(stage[-1]) for stage in self.stages(model))]
        if not isinstance(model.conv_head, nn.Identity):
            widths[-1] = model.conv_head.out_channels
        return widths

    def strides(self, model: nn.Module) -> tuple[int, int]:
        """Return 1 and the total stride."""
        return 1, model.conv_stem.stride[0] * math.prod(map(block_stride, self.blocks(model)))

    def grid_side(self, side: int, stem_patch: int, stride: int) -> int:
        """Return the last map's side: every halving rounds up."""
        return -(-side // stride)

    def divisor(self, model: nn.Module) -> int:
        """Return the divisor of image sides: anti-aliasing pools round down."""
        pools = any(isinstance(getattr(block, "aa", None), nn.AvgPool2d) for block in self.blocks(model))
        return self.strides(model)[1] if pools else 1

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run the stem on images [B, C, H, W]."""
        return model.bn1(model.conv_stem(images))

    def leave_last_stage(self, model: nn.Module, x: Tensor) -> Tensor:
        """Run the head's convolution after the last stage's blocks."""
        return model.bn2(model.conv_head(x))

    def run_block(self, block: nn.Module, x: Tensor, factors: Tensor | None, cache: dict) -> Tensor:
        """Run a block on x [B, C, h, w]; the first row of `factors` scales its branch where there is a shortcut."""
        shortcut = x
        for layer in branch_layers(block):
            x = layer(x)
        return scale_residual(x, factors, 0) + shortcut if block.has_skip else x


def branch_layers(block: nn.Module) -> list[nn.Module]:
    """Return the layers of a block's branch, in order, without absent ones."""
    return [layer for name in BRANCH_LAYERS[type(block)].split() if (layer := getattr(block, name, None)) is not None]


def block_stride(block: nn.Module) -> int:
    """Return the factor by which a block downsamples."""
    total = 1
    for layer in branch_layers(block):
        if isinstance(layer, nn.ModuleDict):  # convolutions of several kernel sizes in parallel
            layer = next(iter(layer.values()))
        stride = getattr(layer, "stride", 1)
        total *= stride if isinstance(stride, int) else stride[0]
    return total


def out_channels(block: nn.Module) -> int:
    """Return the channels after a block."""
    return [layer.out_channels for layer in branch_layers(block) if hasattr(layer, "out_channels")][-1]

"""timm's ConvNeXt (V1, V2) as the backbone runs it: its parts, and one residual block with a drop path of our own."""

from __future__ import annotations

from timm import layers
from timm.models import convnext
from torch import Tensor, nn

from maskwise.functional.errors import UserError

CLASS = convnext.ConvNeXt
BLOCKS = (convnext.ConvNeXtBlock,)
MAPS = True
TAKES = {"patch_size": "patch_size"}
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0}
CLASSIFIER = ("head.fc.", "head.pre_logits.")
MASKS = False
SHALLOW = {"depths": (1, 1, 1, 1)}
translate = convnext.checkpoint_filter_fn
TOKEN_NORMS = {layers.LayerNorm2d: nn.LayerNorm, layers.RmsNorm2d: layers.RmsNorm, layers.SimpleNorm2d: layers.SimpleNorm}


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return [block for stage in model.stages for block in stage.blocks]


def stages(model: nn.Module) -> list:
    """The blocks of each stage."""
    return [stage.blocks for stage in model.stages]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to keep, by timm's names, and the final norm: the head's, or the one before it."""
    last = model.head.norm if isinstance(model.norm_pre, nn.Identity) else model.norm_pre
    return {"stem": model.stem, "stages": model.stages, "norm": of_tokens(last)}


def of_tokens(norm: nn.Module) -> nn.Module:
    """A norm over the channels of maps as one over the last axis, with the same weights."""
    if type(norm) not in TOKEN_NORMS:
        raise UserError(f"{type(norm).__name__} as a last norm is not supported here: leave backbone.norm_layer out")
    same = TOKEN_NORMS[type(norm)](norm.weight.shape[0], eps=norm.eps)
    same.weight = norm.weight
    if getattr(norm, "bias", None) is not None:
        same.bias = norm.bias
    return same


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after each stage."""
    return [model.stem[-1].weight.shape[0], *(stage.blocks[-1].conv_dw.out_channels for stage in model.stages)]


def strides(model: nn.Module) -> tuple[int, int]:
    """Pixels of the stem's patch, and the total stride."""
    first = 1
    for layer in model.stem:
        first *= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
    total = first
    for stage in model.stages:
        total *= 1 if isinstance(stage.downsample, nn.Identity) else stage.downsample[1].stride[0]
    return first, total


def grid(side: int, patch: int, total: int) -> int:
    """Places along a side of so many pixels: convolutions without padding leave a remainder out."""
    return side // total


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of."""
    return 1


def stem(model: nn.Module, images: Tensor) -> Tensor:
    """Images [B, C, H, W] -> the stem's map."""
    return model.stem(images)


def enter(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """What stands before a stage's blocks."""
    return model.stages[stage].downsample(x)


def pass_block(block: nn.Module, x: Tensor, scale: Tensor | None, cache: dict) -> Tensor:
    """A block of x [B, C, H, W]; scale [2, B, 1, 1], of which the first row scales its one residual branch."""
    shortcut = block.shortcut(x)
    x = block.conv_dw(x)
    if block.use_conv_mlp:
        x = block.mlp(block.norm(x))
    else:
        x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    if block.gamma is not None:
        x = x * block.gamma.reshape(1, -1, 1, 1)
    return (x if scale is None else x * scale[0].unsqueeze(-1)) + shortcut


def to_map(x: Tensor) -> Tensor:
    """A stage's output as [B, C, H, W]."""
    return x

"""timm's ConvNeXt (V1, V2): stages of residual blocks with keyed drop path."""

from __future__ import annotations

from timm import layers
from timm.models import convnext
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.families.base import FeatureMapFamily, scale_residual

TOKEN_NORMS = {
    layers.LayerNorm2d: nn.LayerNorm,
    layers.RmsNorm2d: layers.RmsNorm,
    layers.SimpleNorm2d: layers.SimpleNorm,
}


class ConvNeXtFamily(FeatureMapFamily):
    """timm's ConvNeXt."""

    model_class = convnext.ConvNeXt
    channels_last = True
    block_classes = (convnext.ConvNeXtBlock,)
    timm_names = {"patch_size": "patch_size"}
    classifier_prefixes = ("head.fc.", "head.pre_logits.")
    shallow_arguments = {"depths": (1, 1, 1, 1)}

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return convnext.checkpoint_filter_fn(state, model)

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of each stage."""
        return [stage.blocks for stage in model.stages]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a backbone adopts; the final norm is the head's, or the one before it."""
        last = model.head.norm if isinstance(model.norm_pre, nn.Identity) else model.norm_pre
        return {"stem": model.stem, "stages": model.stages, "norm": token_norm(last)}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage."""
        return [model.stem[-1].weight.shape[0], *(stage.blocks[-1].conv_dw.out_channels for stage in model.stages)]

    def strides(self, model: nn.Module) -> tuple[int, int]:
        """Return the stem's patch in pixels and the total stride."""
        patch = 1
        for layer in model.stem:
            patch *= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        total = patch
        for stage in model.stages:
            total *= 1 if isinstance(stage.downsample, nn.Identity) else stage.downsample[1].stride[0]
        return patch, total

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run the stem on images [B, C, H, W]."""
        return model.stem(images)

    def enter_stage(self, model: nn.Module, stage: int, x: Tensor) -> Tensor:
        """Run the downsampling before a stage's blocks."""
        return model.stages[stage].downsample(x)

    def run_block(self, block: nn.Module, x: Tensor, factors: Tensor | None, cache: dict) -> Tensor:
        """Run a block on x [B, C, h, w]; the first row of `factors` scales its one residual branch."""
        shortcut = block.shortcut(x)
        x = block.conv_dw(x)
        if block.use_conv_mlp:
            x = block.mlp(block.norm(x))
        else:
            x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if block.gamma is not None:
            x = x * block.gamma.reshape(1, -1, 1, 1)
        return scale_residual(x, factors, 0) + shortcut


def token_norm(norm: nn.Module) -> nn.Module:
    """Convert a norm over the channels of [B, C, h, w] to one over the last axis, with the same parameters.

    Raises UserError for a kind of norm without such a counterpart.
    """
    if type(norm) not in TOKEN_NORMS:
        raise UserError(f"{type(norm).__name__} is not supported as the last norm: leave backbone.norm_layer out")
    converted = TOKEN_NORMS[type(norm)](norm.weight.shape[0], eps=norm.eps)
    converted.weight = norm.weight
    if getattr(norm, "bias", None) is not None:
        converted.bias = norm.bias
    return converted

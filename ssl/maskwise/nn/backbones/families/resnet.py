"""timm's ResNet: stages of residual blocks with keyed drop path."""

from __future__ import annotations

from timm.models import resnet
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.families.base import FeatureMapFamily, scale_residual
from maskwise.nn.backbones.families.whitening import SIGNS_ALONE, Kernel, Whitening

STEM = ("conv1", "bn1", "act1", "maxpool")
STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNetFamily(FeatureMapFamily):
    """timm's ResNet (ResNeXt, SE-ResNet, ResNet-D).

    The arguments `small_stem` and `whiten` (`Whitening`, in front of the stem) are for images of about 32 pixels.
    """

    model_class = resnet.ResNet
    channels_last = True
    block_classes = (resnet.BasicBlock, resnet.Bottleneck)
    extra_arguments = {"small_stem": bool, "whiten": Kernel, "whiten_signs": bool}
    classifier_prefixes = ("fc.",)
    shallow_arguments = {"layers": (1, 1, 1, 1)}

    def apply_extra_arguments(
        self, model: nn.Module, *, small_stem: bool = False, whiten: int | None = None, whiten_signs: bool = False
    ) -> None:
        """Replace the stem by 3x3 convolutions of stride 1 without pooling, and put a whitening in front of it."""
        if small_stem:
            model.maxpool = nn.Identity()
            if isinstance(model.conv1, nn.Sequential):  # three 3x3 convolutions, the first with the stride
                model.conv1[0].stride = (1, 1)
            else:
                model.conv1 = first_convolution(model.conv1, kernel_size=3, stride=1, padding=1)
        if whiten is not None:
            deep = isinstance(model.conv1, nn.Sequential)
            first = model.conv1[0] if deep else model.conv1
            model.whiten = Whitening(first.in_channels, whiten, whiten_signs)
            first = first_convolution(first, in_channels=model.whiten.out_channels)
            if deep:
                model.conv1[0] = first
            else:
                model.conv1 = first
        elif whiten_signs:
            raise UserError(SIGNS_ALONE)

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of each stage; a shallow network has fewer than four."""
        return [getattr(model, name) for name in STAGES if hasattr(model, name)]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a backbone adopts; there is no final norm."""
        adopted = {name: getattr(model, name) for name in ("whiten", *STEM, *STAGES) if hasattr(model, name)}
        return {**adopted, "norm": nn.Identity()}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage."""
        return [model.feature_info[0]["num_chs"], *(out_channels(stage[-1]) for stage in self.stages(model))]

    def strides(self, model: nn.Module) -> tuple[int, int]:
        """Return 1 and the total stride."""
        total = 1 if isinstance(model.maxpool, nn.Identity) else 4
        for stage in self.stages(model):
            total *= stage[0].stride
        return 1, total

    def grid_side(self, side: int, stem_patch: int, stride: int) -> int:
        """Return the last map's side: every halving rounds up."""
        return -(-side // stride)

    def divisor(self, model: nn.Module) -> int:
        """Return the divisor of image sides: anti-aliasing pools round down where the shortcut rounds up."""
        pools = any(isinstance(block.aa, nn.AvgPool2d) for block in self.blocks(model))
        return self.strides(model)[1] if pools else 1

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run the stem up to its max-pooling."""
        whitened = model.whiten(images) if hasattr(model, "whiten") else images
        return model.act1(model.bn1(model.conv1(whitened)))

    def enter_stage(self, model: nn.Module, stage: int, x: Tensor) -> Tensor:
        """Run the stem's max-pooling before the first stage."""
        return model.maxpool(x) if stage == 0 else x

    def run_block(self, block: nn.Module, x: Tensor, factors: Tensor | None, cache: dict) -> Tensor:
        """Run a block on x [B, C, h, w]; the first row of `factors` scales its one residual branch."""
        shortcut = x if block.downsample is None else block.downsample(x)
        if isinstance(block, resnet.Bottleneck):
            x = block.act1(block.bn1(block.conv1(x)))
            x = block.aa(block.act2(block.bn2(block.conv2(x))))
            x = block.bn3(block.conv3(x))
            activation = block.act3
        else:
            x = block.aa(block.act1(block.bn1(block.conv1(x))))
            x = block.bn2(block.conv2(x))
            activation = block.act2
        if block.se is not None:
            x = block.se(x)
        return activation(scale_residual(x, factors, 0) + shortcut)


def first_convolution(conv: nn.Conv2d, **changed) -> nn.Conv2d:
    """Return a convolution like the first one with other arguments, and fresh weights as timm draws them."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    made = nn.Conv2d(**{**{name: getattr(conv, name) for name in names}, **changed}, bias=conv.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def out_channels(block: nn.Module) -> int:
    """Return the channels after a block."""
    return (block.conv3 if isinstance(block, resnet.Bottleneck) else block.conv2).out_channels

"""timm's ResNet as the backbone runs it: its parts, and one residual block with a drop path of our own."""

from __future__ import annotations

from timm.models import resnet
from torch import Tensor, nn

CLASS = resnet.ResNet
BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)
MAPS = True
TAKES: dict[str, str] = {}
OWN = {"small_stem": bool}  # 3x3 convolutions of stride 1 and no pooling, for images of 32 pixels or so
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0}
CLASSIFIER = ("fc.",)
MASKS = False
SHALLOW = {"layers": (1, 1, 1, 1)}


def translate(state: dict, model: nn.Module) -> dict:
    """timm's names are torchvision's."""
    return state


def alter(model: nn.Module, small_stem: bool) -> None:
    """Put the small stem in place of the usual one."""
    if not small_stem:
        return
    if isinstance(model.conv1, nn.Sequential):  # three convolutions of 3x3, the first with the stride
        model.conv1[0].stride = (1, 1)
    else:
        model.conv1 = nn.Conv2d(model.conv1.in_channels, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def stages(model: nn.Module) -> list:
    """The blocks of each stage."""
    return [getattr(model, name) for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(model, name)]


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return [block for stage in stages(model) for block in stage]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to keep, by timm's names, and the final norm, of which there is none."""
    kept = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return {**{name: getattr(model, name) for name in kept if hasattr(model, name)}, "norm": nn.Identity()}


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after each stage."""
    return [model.feature_info[0]["num_chs"], *(last_conv(stage[-1]).out_channels for stage in stages(model))]


def last_conv(block: nn.Module) -> nn.Conv2d:
    return block.conv3 if isinstance(block, resnet.Bottleneck) else block.conv2


def strides(model: nn.Module) -> tuple[int, int]:
    """Pixels of the stem's patch, or 1, and the total stride."""
    total = 1 if isinstance(model.maxpool, nn.Identity) else 4
    for block in (stage[0] for stage in stages(model)):
        total *= block.stride
    return 1, total


def grid(side: int, patch: int, total: int) -> int:
    """Places along a side of so many pixels: every halving rounds up."""
    return -(-side // total)


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of: average pooling against aliasing rounds down where the shortcut rounds up."""
    return strides(model)[1] if any(isinstance(block.aa, nn.AvgPool2d) for block in blocks(model)) else 1


def stem(model: nn.Module, images: Tensor) -> Tensor:
    """Images [B, C, H, W] -> the stem's map, before its max-pooling."""
    return model.act1(model.bn1(model.conv1(images)))


def enter(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """What stands before a stage's blocks."""
    return model.maxpool(x) if stage == 0 else x


def pass_block(block: nn.Module, x: Tensor, scale: Tensor | None, cache: dict) -> Tensor:
    """A block of x [B, C, H, W]; scale [2, B, 1, 1], of which the first row scales its one residual branch."""
    shortcut = x if block.downsample is None else block.downsample(x)
    if isinstance(block, resnet.Bottleneck):
        x = block.act1(block.bn1(block.conv1(x)))
        x = block.aa(block.act2(block.bn2(block.conv2(x))))
        x = block.bn3(block.conv3(x))
        last = block.act3
    else:
        x = block.aa(block.act1(block.bn1(block.conv1(x))))
        x = block.bn2(block.conv2(x))
        last = block.act2
    if block.se is not None:
        x = block.se(x)
    return last((x if scale is None else x * scale[0].unsqueeze(-1)) + shortcut)


def to_map(x: Tensor) -> Tensor:
    """A stage's output as [B, C, H, W]."""
    return x

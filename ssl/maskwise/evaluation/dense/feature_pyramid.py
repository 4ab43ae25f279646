"""Feature pyramids over an encoder's backbone, as the backbone of torchvision's Mask R-CNN."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.errors import UserError

LEVELS = 4
CHANNELS = 256


class Pyramid(nn.Module):
    """Images -> {"0", ..., "3", "pool"}: five maps of `out_channels`, each half as large as the one before.

    The encoder stays in eval mode: batch statistics are frozen and nothing is dropped, while its weights are trained.
    """

    def __init__(self, encoder, out_channels: int = CHANNELS):
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels

    def train(self, mode: bool = True):
        """Set the mode of all parts but the encoder."""
        super().train(mode)
        self.encoder.eval()
        return self


class SimplePyramid(Pyramid):
    """Maps of a transformer's last patches at strides of 1/4, 1/2, 1 and 2 patches (ViTDet, section 3)."""

    def __init__(self, encoder, out_channels: int = CHANNELS):
        super().__init__(encoder, out_channels)
        dim = encoder.dim
        half, quarter = max(1, dim // 2), max(1, dim // 4)
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, half, 2, stride=2),
                    ChannelNorm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ),
                nn.ConvTranspose2d(dim, half, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, out_channels, 1, bias=False),
                ChannelNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelNorm(out_channels),
            )
            for width in (quarter, half, dim, dim)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map normalized images [B, C, H, W] to five maps."""
        features = self.encoder(images, attention=False)
        last = features.patches.transpose(1, 2).unflatten(2, features.grid)
        maps = [output(scale(last)) for scale, output in zip(self.scales, self.outputs)]
        return named(maps)


class StagePyramid(Pyramid):
    """Feature pyramid network over the last four stages of a network of feature maps (Lin et al. 2017)."""

    def __init__(self, encoder, out_channels: int = CHANNELS):
        super().__init__(encoder, out_channels)
        from torchvision.ops import FeaturePyramidNetwork

        count = len(encoder.backbone.stage_dims)
        if count - 1 < LEVELS:
            raise UserError(
                f"detection: {encoder.backbone.name} has {count - 1} stages, and a feature pyramid needs {LEVELS}; "
                "choose a Vision Transformer or a network of four stages"
            )
        self.layers = tuple(range(count - LEVELS, count))
        widths = [encoder.backbone.stage_dims[layer] for layer in self.layers]
        self.network = FeaturePyramidNetwork(widths, out_channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map normalized images [B, C, H, W] to five maps."""
        stages = self.encoder(images, attention=False, layers=self.layers).layers
        return named(list(self.network(named(list(stages))).values())[:LEVELS])


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize each position."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def named(maps: list[Tensor]) -> OrderedDict[str, Tensor]:
    """Return maps by torchvision's names, and the last one at every second pixel as `pool`."""
    levels = OrderedDict((str(number), level) for number, level in enumerate(maps))
    levels["pool"] = F.max_pool2d(maps[-1], 1, stride=2)
    return levels


def pyramid_of(encoder) -> Pyramid:
    """Return the pyramid that fits an encoder. Raises UserError for a model without a backbone."""
    backbone = getattr(encoder, "backbone", None)
    if backbone is None:
        raise UserError("detection needs an encoder of maskwise.load, or a run or weights file; give its path")
    return SimplePyramid(encoder) if getattr(backbone, "stage_dims", None) is None else StagePyramid(encoder)

"""Small encoders and images for tests of `maskwise look`."""

import torch

from maskwise.data.datasets.shapes import Shapes
from maskwise.nn import POOLINGS, Backbone, Encoder


def vit(pooling="cls", *, depth=3, heads=2, patch=8, size=32, width=24, class_token=True):
    """A small Vision Transformer with strong random weights, so that its attention is far from uniform."""
    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224",
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        class_token=class_token,
    )
    encoder = Encoder(backbone, POOLINGS[pooling](width)).eval()
    with torch.no_grad():
        for weight in encoder.backbone.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    return encoder


def image(height=48, width=80, number=0):
    """An image of two shapes side by side, cut to a size, uint8 [3, H, W]."""
    data = Shapes(number + 2, size=96)
    return torch.cat([data.image(number), data.image(number + 1)], dim=2)[:, :height, :width]

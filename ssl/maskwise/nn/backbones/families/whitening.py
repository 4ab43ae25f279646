"""Whitening of image patches as a first layer: a convolution with fixed filters."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskwise.bounds import Between

SIGNS_ALONE = "backbone.whiten_signs belongs to a whitening: set backbone.whiten, such as 3"
Kernel = Annotated[int, Between(2, 5)]


def responses(channels: int, kernel: int, signs: bool) -> int:
    """Return the channels after a whitening."""
    return channels * kernel * kernel * (1 + signs)


class Whitening(nn.Conv2d):
    """Filter k x k patches of images [B, C, H, W] to [B, P, H, W], with P = C * k * k; the filters are a buffer.

    signs: append the negative responses and clip all at 0, [B, 2 P, H, W]. Until filters are learned from images
    (build/whitening.py) each copies one pixel of its patch.
    """

    def __init__(self, channels: int, kernel: int, signs: bool = False):
        super().__init__(channels, responses(channels, kernel, signs), kernel, padding="same", bias=False)
        self.signs = signs
        del self.weight
        self.register_buffer("weight", torch.zeros(self.out_channels, channels, kernel, kernel))
        self.set_filters(torch.eye(channels * kernel * kernel))

    @torch.no_grad()
    def set_filters(self, filters: Tensor) -> None:
        """Set the filters [P, P], one per row (`functional.whitening.patches.whitening_filters`)."""
        rows = torch.cat([filters, -filters]) if self.signs else filters
        self.weight.copy_(rows.reshape(self.weight.shape))

    def forward(self, images: Tensor) -> Tensor:
        """Return the responses."""
        if self.kernel_size[0] % 2 == 0:  # torch warns of even kernels with padding="same", which is this
            before, after = self.kernel_size[0] // 2 - 1, self.kernel_size[0] // 2
            responses = F.conv2d(F.pad(images, (before, after, before, after)), self.weight)
        else:
            responses = super().forward(images)
        return responses.relu() if self.signs else responses

"""A teacher of one's own, as `module:Class`: a convolution whose weights never change."""

import torch
from torch import nn


class TinyTeacher(nn.Module):
    """Images [B, 3, H, W] to a map [B, 10, H / 8, W / 8]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 10, 8, 8)
        self.layer.weight.data = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.1

    def forward(self, x):
        """Return the map."""
        return self.layer(x).tanh()


class Moved(TinyTeacher):
    """The same weights under another name."""

"""Batch norm that a single value does not break."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_normed(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A batch norm of a map; statistics of a single value do not exist, so such a batch takes the running ones."""
    if layer.training and x.numel() == x.shape[1]:
        scale = (layer.weight / torch.sqrt(layer.running_var + layer.eps)).to(x.dtype)
        return (x - layer.running_mean.to(x.dtype)[:, None, None]) * scale[:, None, None] + layer.bias.to(x.dtype)[:, None, None]
    return layer(x.to(layer.weight.dtype)).to(x.dtype)

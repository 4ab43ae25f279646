"""Batch norm for batches of a single value."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_normed(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Apply a batch norm to x [B, C, h, w] in the dtype of its weights; returns the dtype of x.

    A batch with a single value per channel has no variance: it uses the running statistics.
    """
    if layer.training and x.numel() == x.shape[1]:
        mean, bias = (value.to(x.dtype)[:, None, None] for value in (layer.running_mean, layer.bias))
        scale = (layer.weight / torch.sqrt(layer.running_var + layer.eps)).to(x.dtype)[:, None, None]
        return (x - mean) * scale + bias
    return layer(x.to(layer.weight.dtype)).to(x.dtype)

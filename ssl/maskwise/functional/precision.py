"""Precision: softmax, norms and losses in at least float32; the dtype of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32; float64 stays float64."""
    return tensor.to(at_least_float32_dtype(tensor.dtype))


def at_least_float32_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of this tensor run: that of autocast if it is on, else its own."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def autocast_off(tensor: Tensor) -> torch.autocast:
    """Return a context without autocast on the tensor's device: on a CPU autocast keeps softmax in bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)

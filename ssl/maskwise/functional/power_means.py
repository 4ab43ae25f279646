"""Weighted means over positions: power means from the minimum to the maximum, and log-mean-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def power_mean(weights: Tensor, values: Tensor, gamma: float | Tensor) -> Tensor:
    """Return (sum_j w_j v_j^gamma)^(1/gamma): weights [..., k, N] of sum 1, values [..., N, D] >= 0 -> [..., k, D].

    gamma = (1 - alpha) / 2 of f_alpha (SimPool, eq. 8): inf is the maximum, 1 the mean, 0 (alpha = 1) the geometric
    mean, -1 the harmonic mean, -inf the minimum. With gamma <= 0 a value of 0 makes the mean 0. Negative values give
    NaN unless gamma is an integer.
    """
    if isinstance(gamma, Tensor):
        top = values.detach().amax(dim=-2, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        mean = torch.matmul(weights, (values / top).pow(gamma)).clamp_min(torch.finfo(values.dtype).tiny)
        return mean.pow(1 / gamma) * top
    if math.isinf(gamma):
        held = weights.unsqueeze(-1) > 0
        far = torch.finfo(values.dtype).max
        spread = torch.where(held, values.unsqueeze(-3), -far if gamma > 0 else far)
        return spread.amax(dim=-2) if gamma > 0 else spread.amin(dim=-2)
    if gamma == 0:
        return torch.matmul(weights, values.log()).exp()
    edge = values.detach().amax(dim=-2, keepdim=True) if gamma > 0 else values.detach().amin(dim=-2, keepdim=True)
    edge = edge.clamp_min(torch.finfo(values.dtype).tiny)  # a scale that cancels: no power under- or overflows
    mean = torch.matmul(weights, (values / edge).pow(gamma)).clamp_min(torch.finfo(values.dtype).tiny)
    return mean.pow(1 / gamma) * edge


def log_mean_exp(weights: Tensor, values: Tensor, scale: float | Tensor) -> Tensor:
    """Return log(sum_j w_j exp(r v_j)) / r: weights [..., k, N], values [..., N, D] -> [..., k, D].

    It lies between the mean (r -> 0) and the maximum.
    """
    lifted = scale * values.unsqueeze(-3) + weights.clamp_min(torch.finfo(values.dtype).tiny).log().unsqueeze(-1)
    return torch.logsumexp(lifted, dim=-2) / scale

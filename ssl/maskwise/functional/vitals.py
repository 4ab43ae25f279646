"""What a batch shows of a run's health, as 0-dim tensors on its device that nobody has to read at once."""

from __future__ import annotations

import torch
from torch import Tensor


def participation_ratio(features: Tensor) -> Tensor:
    """How many directions features [n, D] fill: (sum of eigenvalues)^2 / sum of their squares, of their covariance.

    Between 1 and min(n - 1, D); 0 where all rows are equal. One product of the smaller side, no decomposition.
    """
    centred = features - features.mean(dim=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    total = gram.diagonal().sum()
    return total.square() / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny)


def twin_share(unit: Tensor, alike: float = 0.999) -> Tensor:
    """Share of the pairs of different rows whose cosine exceeds `alike`: unit vectors [n, D] -> scalar, 0 for fewer than two rows."""
    pairs = len(unit) * (len(unit) - 1)
    return ((unit @ unit.T > alike).sum() - len(unit)).clamp_min(0) / max(1, pairs)


def mask_agreement(mask: Tensor) -> Tensor:
    """How alike the masks of different views are, bool [V, N] -> Fleiss' kappa: 1 for equal masks, about 0 for independent ones.

    Views without a hidden patch are left out; 0 where fewer than two are left, or where they hide everything.
    """
    masked = mask.any(dim=1).sum().to(torch.float32)
    share = mask.sum(dim=0) / masked.clamp_min(1)
    mean = share.mean()
    within = (share * (1 - share)).mean() * masked / (masked - 1).clamp_min(1)
    between = mean * (1 - mean)
    defined = (masked > 1) & (between > 0)
    return torch.where(defined, 1 - within / torch.where(defined, between, 1.0), 0.0)

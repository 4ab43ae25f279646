"""Soft targets of labels, the losses that are taken to them, and top-k hits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional.errors import UserError

LOSSES = ("softmax", "bce")


def smoothed(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Targets float32 [B, C] of labels int64 [B]: 1 - smoothing + smoothing / C on the label's class, smoothing / C on the others."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, mean over rows: [B, C], [B, C] -> scalar in float32 or better."""
    logits = _wide(logits)
    return -(targets.to(logits.dtype) * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def binary_loss(logits: Tensor, targets: Tensor, threshold: float | None = None) -> Tensor:
    """Binary cross-entropy of every class, mean over rows and classes: [B, C], [B, C] -> scalar; targets above `threshold` become 1, the others 0."""
    logits = _wide(logits)
    targets = targets.to(logits.dtype) if threshold is None else (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets)


def jsd(logits: Tensor, splits: int) -> Tensor:
    """Divergence between the predictions for `splits` views of each image, split-major [splits * B, C] -> scalar.

    Mean over views of KL(p_v || mean of all p), mean over images (Hendrycks et al. 2020, AugMix, eq. 4); the mean is kept above 1e-7.
    """
    logs = F.log_softmax(_wide(logits), dim=-1).unflatten(0, (splits, -1))
    probs = logs.exp()
    mixture = probs.mean(dim=0).clamp(1e-7, 1).log()
    return (probs * (logs - mixture)).sum(dim=-1).mean()


def hits(logits: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Number of rows whose label is the first, and among the first k (or C) of the logits: [B, C], int64 [B] -> int64 [2]; ties by lowest class."""
    ranked = logits.argsort(dim=1, descending=True, stable=True)[:, : min(k, logits.shape[1])]
    right = ranked == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])


def criterion(loss: str = "softmax", *, splits: int = 1, jsd_weight: float = 0.0, threshold: float | None = None):
    """The callable (logits [splits * B, C], targets [B, C]) -> scalar that a method hands to its classifier.

    With `splits` views of each image the loss is that of the first, plus jsd_weight times their divergence, or where that is 0 the
    mean over all. Raises UserError for a loss outside LOSSES.
    """
    if loss not in LOSSES:
        raise UserError(f"method.loss={loss!r} is unknown: choose one of {', '.join(LOSSES)}")

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_loss(logits, targets) if loss == "softmax" else binary_loss(logits, targets, threshold)

    def call(logits: Tensor, targets: Tensor) -> Tensor:
        if splits == 1:
            return plain(logits, targets)
        if not jsd_weight:
            return plain(logits, targets.repeat(splits, 1))
        return plain(logits[: len(targets)], targets) + jsd_weight * jsd(logits, splits)

    return call


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

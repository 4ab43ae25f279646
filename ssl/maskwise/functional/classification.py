"""Soft targets of labels, their losses, and top-k accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32

LOSSES = ("softmax", "bce")


def smooth_labels(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Return targets float32 [B, C] of labels int64 [B], with smoothing / C spread over all C classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy with soft targets, mean over rows: [B, C], [B, C] -> scalar in at least float32."""
    logits = at_least_float32(logits)
    return -(targets.to(logits.dtype) * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def binary_loss(logits: Tensor, targets: Tensor, threshold: float | None = None) -> Tensor:
    """Return the binary cross-entropy, mean over rows and classes: [B, C], [B, C] -> scalar.

    With a `threshold`, targets above it become 1 and the others 0.
    """
    logits = at_least_float32(logits)
    targets = targets.to(logits.dtype) if threshold is None else (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets)


def jsd(logits: Tensor, splits: int) -> Tensor:
    """Return the divergence of the predictions for `splits` views of each image, view-major [splits * B, C] -> scalar.

    Mean over views of KL(p_v || mean of all p), mean over images (AugMix, sec. 3); the mean is clamped to 1e-7.
    """
    logs = F.log_softmax(at_least_float32(logits), dim=-1).unflatten(0, (splits, -1))
    probs = logs.exp()
    mixture = probs.mean(dim=0).clamp(1e-7, 1).log()
    return (probs * (logs - mixture)).sum(dim=-1).mean()


def topk_correct(logits: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Count the rows with the label first, and among the first k, of the logits: [B, C], int64 [B] -> int64 [2].

    Ties go to the lowest class.
    """
    ranked = logits.argsort(dim=1, descending=True, stable=True)[:, : min(k, logits.shape[1])]
    right = ranked == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])


def criterion(loss: str = "softmax", *, splits: int = 1, jsd_weight: float = 0.0, threshold: float | None = None):
    """Return a function (logits [splits * B, C], targets [B, C]) -> scalar, the loss of a classifier.

    With `splits` views of each image the loss is that of the first plus jsd_weight times their divergence, or with
    weight 0 the mean over all. Raises UserError for a loss outside LOSSES.
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

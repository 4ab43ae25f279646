"""Collapse statistics of a batch, as 0-dim tensors on its device (no host sync)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional.chunked_losses import LinearLogits, TeacherProbs, chunks
from maskwise.functional.precision import at_least_float32, autocast_off

PATCH_SAMPLE = 1024  # masked patches, about, whose targets enter the statistics


@torch.no_grad()
def view_statistics(student_logits: LinearLogits, teacher_probs: TeacherProbs) -> dict[str, Tensor]:
    """Return statistics of the targets of whole crops: logits [S, B, K], probabilities [G, B, K].

    teacher_entropy is the mean entropy of the targets and teacher_spread the entropy of their mean, both in nats;
    agreement is the share of images whose arg-max in teacher view 0 is the student's in view 1.
    """
    views, samples, prototypes = student_logits.shape
    device = student_logits.bottleneck.device
    second_view = LinearLogits(student_logits.bottleneck[1], student_logits.weight).cast()
    sums = []
    for start, stop in chunks(samples, views * prototypes, device):
        probs = teacher_probs.rows(start, stop)
        agree = probs[0].argmax(dim=-1) == second_view.rows(start, stop).argmax(dim=-1)
        sums.append((torch.special.entr(probs).sum(), probs.sum(dim=(0, 1)), agree.sum()))
    entropy, total, agreeing = (torch.stack(values).sum(dim=0) for values in zip(*sums))
    count = teacher_probs.shape[0] * samples
    return {
        "teacher_entropy": entropy / count,
        "teacher_spread": torch.special.entr(total / count).sum(),
        "agreement": agreeing.to(entropy.dtype) / samples,
    }


@torch.no_grad()
def patch_statistics(teacher_probs: TeacherProbs, weights: Tensor) -> dict[str, Tensor]:
    """Return statistics of the targets of masked patches: probabilities [M, K], loss weights [M].

    patch_entropy is their mean entropy and patch_spread the entropy of their mean, in nats, of about a thousand
    patches weighted as in the loss; 0 if no patch is masked.
    """
    rows, prototypes = teacher_probs.shape
    stride, sums = max(1, rows // PATCH_SAMPLE), []
    for start, stop in chunks(rows, prototypes, weights.device):
        probs = teacher_probs.rows(start, stop, stride)
        weight = weights[start:stop:stride].to(probs.dtype)
        with autocast_off(probs):
            sums.append((torch.special.entr(probs).sum(dim=-1) @ weight, weight @ probs, weight.sum()))
    if not sums:
        nothing = torch.zeros((), device=weights.device)
        return {"patch_entropy": nothing, "patch_spread": nothing}
    entropy, mean, total = (torch.stack(values).sum(dim=0) for values in zip(*sums))
    total = total.clamp_min(torch.finfo(total.dtype).tiny)
    return {"patch_entropy": entropy / total, "patch_spread": torch.special.entr(mean / total).sum()}


@torch.no_grad()
def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Return statistics of features [V * B, D], crop-major, after scaling to unit length.

    feature_std is their standard deviation times sqrt(D), 1 if they are spread out and 0 if they have collapsed;
    feature_rank their participation ratio; feature_duplicates the share of equal pairs in the first half.
    """
    unit = F.normalize(at_least_float32(features), dim=-1)
    first_half = unit[: (len(unit) + 1) // 2]
    with autocast_off(unit):
        return {
            "feature_std": unit.std(dim=0, unbiased=False).mean() * math.sqrt(unit.shape[-1]),
            "feature_rank": participation_ratio(unit),
            "feature_duplicates": duplicate_fraction(first_half).to(unit.dtype),
        }


def participation_ratio(features: Tensor) -> Tensor:
    """Return (sum of eigenvalues)^2 / sum of their squares of the covariance of features [n, D].

    This is the number of directions that the features fill, between 1 and min(n - 1, D); 0 if all rows are equal. One
    product of the smaller side, no decomposition.
    """
    centered = features - features.mean(dim=0)
    gram = centered @ centered.T if len(centered) < centered.shape[1] else centered.T @ centered
    total = gram.diagonal().sum()
    return total.square() / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny)


def duplicate_fraction(unit: Tensor, threshold: float = 0.999) -> Tensor:
    """Return the share of pairs of unit vectors [n, D] whose cosine exceeds `threshold`; 0 for fewer than two rows."""
    pairs = len(unit) * (len(unit) - 1)
    return ((unit @ unit.T > threshold).sum() - len(unit)).clamp_min(0) / max(1, pairs)


def mask_agreement(mask: Tensor) -> Tensor:
    """Return Fleiss' kappa of the masks of different views, bool [V, N]: 1 if all are equal, about 0 if independent.

    Unmasked views are left out; 0 if fewer than two are left, or if they mask everything.
    """
    masked = mask.any(dim=1).sum().to(torch.float32)
    share = mask.sum(dim=0) / masked.clamp_min(1)
    mean = share.mean()
    within = (share * (1 - share)).mean() * masked / (masked - 1).clamp_min(1)
    between = mean * (1 - mean)
    defined = (masked > 1) & (between > 0)
    return torch.where(defined, 1 - within / torch.where(defined, between, 1.0), 0.0)

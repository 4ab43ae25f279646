"""The two losses of DINO and iBOT, in at least float32. The teacher's side carries no gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.functional.errors import UserError
from maskwise.functional.targets import center_and_sharpen


def cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """-sum_k p_k log softmax(s / temp)_k of each row: [M, K], [M, K] -> [M]."""
    return -(teacher_probs.detach() * _log_softmax(student_logits, student_temp)).sum(dim=-1)


def dino_loss(
    student_logits: Tensor, teacher_logits: Tensor, center: Tensor, student_temp: float = 0.1, teacher_temp: float = 0.04
) -> Tensor:
    """Cross-entropy of each student view with every other teacher view: [S, B, K], [G, B, K], [K] -> scalar.

    Views 0..G-1 of the student are the teacher's own; same-view pairs are left out. Raises UserError where no pair
    is left. Caron et al. 2021; attmask.md 1.4.
    """
    return dino_loss_from_probs(student_logits, center_and_sharpen(teacher_logits, center, teacher_temp), student_temp)


def dino_loss_from_probs(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """`dino_loss` for teacher distributions [G, B, K] that are already made: mean over the G * (S - 1) pairs and B."""
    views, batch, teachers = student_logits.shape[0], student_logits.shape[1], teacher_probs.shape[0]
    if views < teachers or views < 2:
        raise UserError(f"{views} student and {teachers} teacher views leave no pair of different views; use two global crops, or local ones")
    logs = _log_softmax(student_logits, student_temp)
    everyone = logs.sum(dim=0)
    total = sum((probs * (everyone - own)).sum() for probs, own in zip(teacher_probs.detach(), logs))
    return -total / (teachers * (views - 1) * batch)


def ibot_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    center: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    reduction: str = "image",
) -> Tensor:
    """Cross-entropy on hidden patches: [M, K], [M, K] in mask.nonzero() order, bool [V, N], [K] -> scalar.

    "image" averages over the hidden patches of each view and then over all V views, an unmasked one counting 0;
    "token" averages over all hidden patches. Zhou et al. 2022; attmask.md 1.4.
    """
    return ibot_loss_from_probs(student_logits, center_and_sharpen(teacher_logits, center, teacher_temp), mask, student_temp, reduction)


def ibot_loss_from_probs(
    student_logits: Tensor,
    teacher_probs: Tensor,
    mask: Tensor,
    student_temp: float = 0.1,
    reduction: str = "image",
    total: float | Tensor | None = None,
) -> Tensor:
    """`ibot_loss` for teacher distributions that are already made; rows beyond mask.sum() are padding and weigh 0.

    total: for "token", the number of hidden patches to divide by where the mask is only a part of the batch.
    """
    weights = patch_weights(mask, student_logits.shape[0], reduction, total)
    per_row = cross_entropy(student_logits, teacher_probs, student_temp)
    return (per_row * weights.to(per_row.dtype)).sum()


def patch_weights(mask: Tensor, rows: int, reduction: str = "image", total: float | Tensor | None = None) -> Tensor:
    """The weight of each row of patch logits in the loss: bool [V, N] -> float64 [rows], without a wait for the device."""
    if reduction not in ("image", "token"):
        raise UserError(f"unknown patch loss {reduction!r}; choose image or token")
    counts = mask.sum(dim=1)
    hidden = counts.sum()
    if reduction == "image":
        weights = 1.0 / (counts.clamp_min(1).double() * mask.shape[0])
    else:
        total = hidden if total is None else torch.as_tensor(total, device=mask.device)
        weights = (1.0 / total.clamp_min(1).double()).expand(mask.shape[0])
    # One more, weightless entry takes up the padding.
    return torch.repeat_interleave(F.pad(weights, (0, 1)), torch.cat([counts, (rows - hidden)[None]]), output_size=rows)


def _log_softmax(logits: Tensor, temp: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(logits / temp, dim=-1)

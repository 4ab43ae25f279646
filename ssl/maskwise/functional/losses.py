"""The losses of DINO and iBOT, in at least float32; the teacher's side carries no gradient.

Each loss takes logits as a tensor, or as `LinearLogits`: then the same cross-entropy is computed in chunks, so that
logits over 65,536 prototypes are never whole in memory. Training takes the second way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional import chunked_losses
from maskwise.functional.chunked_losses import CenteredProbs, LinearLogits, TeacherProbs, WholeProbs
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.functional.targets import center_and_sharpen


def cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Return -sum_k p_k log softmax(s / temp)_k of each row: [M, K], [M, K] -> [M]."""
    log_probs = F.log_softmax(at_least_float32(student_logits) / student_temp, dim=-1)
    return -(teacher_probs.detach() * log_probs).sum(dim=-1)


def dino_loss(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    center: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
) -> Tensor:
    """Return the cross-entropy of each student view with every other teacher view: [S, B, K], [G, B, K], [K] -> scalar.

    Student views 0..G-1 are the teacher's own, and pairs of one view are left out (DINO, eq. 3). Raises UserError if
    no pair is left.
    """
    return dino_loss_from_probs(student_logits, centered_probs(teacher_logits, center, teacher_temp), student_temp)


def dino_loss_from_probs(
    student_logits: Tensor | LinearLogits, teacher_probs: Tensor | TeacherProbs, student_temp: float = 0.1
) -> Tensor:
    """Return `dino_loss` for teacher probabilities [G, B, K]: the mean over G * (S - 1) pairs and B samples."""
    probs = as_teacher_probs(teacher_probs)
    views, samples = student_logits.shape[:2]
    teachers = probs.shape[0]
    if views < teachers or views < 2:
        raise UserError(
            f"{views} student and {teachers} teacher views form no pair of different views: "
            "use two global crops, or local ones"
        )
    if isinstance(student_logits, LinearLogits):
        return chunked_losses.view_pair_loss(student_logits, probs, student_temp)
    log_probs = F.log_softmax(at_least_float32(student_logits) / student_temp, dim=-1)
    all_views = log_probs.sum(dim=0)
    total = sum((p * (all_views - own)).sum() for p, own in zip(probs.rows(0, samples).detach(), log_probs))
    return -total / (teachers * (views - 1) * samples)


def ibot_loss(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    mask: Tensor,
    center: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    reduction: str = "image",
) -> Tensor:
    """Return the cross-entropy on masked patches: [M, K], [M, K] in mask.nonzero() order, bool [V, N], [K] -> scalar.

    Reduction "image" averages over the masked patches of each view, then over all V views, an unmasked one counting 0
    (iBOT, eq. 3, and its code); "token" averages over all masked patches.
    """
    probs = centered_probs(teacher_logits, center, teacher_temp)
    return ibot_loss_from_probs(student_logits, probs, mask, student_temp, reduction)


def ibot_loss_from_probs(
    student_logits: Tensor | LinearLogits,
    teacher_probs: Tensor | TeacherProbs,
    mask: Tensor,
    student_temp: float = 0.1,
    reduction: str = "image",
    num_masked_total: float | Tensor | None = None,
) -> Tensor:
    """Return `ibot_loss` for teacher probabilities [M, K]; rows beyond mask.sum() are padding with weight 0.

    `num_masked_total` is the divisor of "token" where the mask is a part of the batch.
    """
    probs = as_teacher_probs(teacher_probs)
    rows = student_logits.shape[0]
    weights = patch_weights(mask, rows, reduction, num_masked_total)
    if isinstance(student_logits, LinearLogits):
        return chunked_losses.token_loss(student_logits, probs, weights, student_temp)
    per_patch = cross_entropy(student_logits, probs.rows(0, rows), student_temp)
    return (per_patch * weights.to(per_patch.dtype)).sum()


def patch_weights(
    mask: Tensor, rows: int, reduction: str = "image", num_masked_total: float | Tensor | None = None
) -> Tensor:
    """Return the weight of each masked patch in the loss: bool [V, N] -> float64 [rows], without a host sync."""
    if reduction not in ("image", "token"):
        raise UserError(f"unknown patch loss {reduction!r}: choose image or token")
    masked_per_view = mask.sum(dim=1)
    num_masked = masked_per_view.sum()
    if reduction == "image":
        weights = 1.0 / (masked_per_view.clamp_min(1).double() * mask.shape[0])
    else:
        total = num_masked if num_masked_total is None else torch.as_tensor(num_masked_total, device=mask.device)
        weights = (1.0 / total.clamp_min(1).double()).expand(mask.shape[0])
    # one more entry, of weight 0, takes up the padding
    repeats = torch.cat([masked_per_view, (rows - num_masked)[None]])
    return torch.repeat_interleave(F.pad(weights, (0, 1)), repeats, output_size=rows)


def centered_probs(logits: Tensor | LinearLogits, center: Tensor, temp: float) -> TeacherProbs:
    """Return the probabilities of teacher logits [..., M, K], centered with [K] and sharpened (DINO, sec. 3.1)."""
    if isinstance(logits, LinearLogits):
        return CenteredProbs(logits.cast(), center, temp)
    return WholeProbs(center_and_sharpen(logits, center, temp))


def as_teacher_probs(probs: Tensor | TeacherProbs) -> TeacherProbs:
    """Return a tensor of probabilities [..., M, K] as `WholeProbs`, anything else unchanged."""
    return WholeProbs(probs) if isinstance(probs, Tensor) else probs


def koleo_loss(features: Tensor) -> Tensor:
    """Return the KoLeo regularizer of features [V, B, D]: minus the mean log distance to the nearest other image.

    Distances are Euclidean between L2-normalized features of the same view, 0-dim result (Sablayrolles et al. 2019,
    eq. 5; DINOv2, Oquab et al. 2023, sec. 4). The nearest image is found without gradient; both ends receive one.
    """
    with autocast_off(features):
        unit = F.normalize(at_least_float32(features), dim=-1)
        with torch.no_grad():
            similarity = unit @ unit.mT
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-2)
            nearest = similarity.argmax(dim=-1, keepdim=True)
        neighbor = unit.gather(1, nearest.expand(-1, -1, unit.shape[-1]))
        distance = F.pairwise_distance(unit, neighbor, eps=1e-8)
        return -(distance + 1e-8).log().mean()

"""Losses of MAP, in at least float32: distillation within and between token groups, and the total."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.precision import at_least_float32

REDUCTIONS = ("mean_elements", "batchmean")
TEACHERS = ("tokens", "averaged")
CENTERS = ("logits", "probabilities")
TOTALS = ("per_group", "sum")


def divergence(teacher_logits: Tensor, student_logits: Tensor, reduction: str = "mean_elements") -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of rows [..., B, C], summed; no gradient for the teacher.

    reduction: divided by B * C ("mean_elements", as in the code of MAP) or by B ("batchmean").
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        logs = torch.log_softmax(at_least_float32(teacher_logits.detach()), dim=-1)
        return _sum(logs, student_logits, reduction)


def intra_group(
    logits: Tensor, averaged: Tensor, *, reduction: str = "mean_elements", teacher: str = "tokens"
) -> Tensor:
    """Return the divergence of a group's tokens and its averaged token, summed over groups: twice [B, G, C] -> scalar.

    teacher "tokens": KL(tokens || averaged), so that the averaged token learns (MAP, eq. 3, and its code); "averaged":
    the tokens learn from the averaged token (MAP, sec. 4.2.2).
    """
    check(reduction, teacher=teacher)
    logits, averaged = logits.transpose(0, 1), averaged.transpose(0, 1)
    return divergence(logits, averaged, reduction) if teacher == "tokens" else divergence(averaged, logits, reduction)


def inter_group(logits: Tensor, *, reduction: str = "mean_elements", center: str = "logits") -> Tensor:
    """Return the divergence KL(p* || p_g) of the groups from their joint prediction: [B, G, C] -> scalar, 0 for one.

    p*, without gradient, is the softmax of the mean "logits" (the code of MAP) or the mean of the groups'
    "probabilities" (MAP, eq. 4). The weight is negative: groups should differ.
    """
    check(reduction, center=center)
    with torch.autocast(logits.device.type, enabled=False):
        groups = at_least_float32(logits.transpose(0, 1))
        fixed = groups.detach()
        if center == "logits":
            logs = fixed.mean(dim=0).log_softmax(dim=-1)
        else:
            logs = fixed.softmax(dim=-1).mean(dim=0).log()
        return _sum(logs, groups, reduction)


def map_loss(
    logits: Tensor,
    averaged: Tensor | None,
    targets: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    intra: float = 1.0,
    inter: float = -0.8,
    reduction: str = "mean_elements",
    teacher: str = "tokens",
    center: str = "logits",
    total: str = "per_group",
) -> dict[str, Tensor]:
    """Return the loss of MAP and its terms, {"loss", "label", "intra", "inter"} (MAP, eq. 5).

    logits of the tokens [B, G, C], and averaged, of the averaged tokens, [B, G, C] or None. label: `criterion` of each
    group, summed, without the averaged tokens ("per_group", the code of MAP), or of the sum over groups and averaged
    tokens ("sum", MAP, algorithm 1). The other terms are returned unweighted; one of weight 0 is not computed. With
    "batchmean" and a negative weight the inter term has no lower bound.
    """
    check(reduction, teacher=teacher, center=center, total=total)
    if total == "per_group":
        per_group = [criterion(group, targets) for group in logits.unbind(dim=1)]
        label = sum(per_group[1:], start=per_group[0])
    else:
        label = criterion(logits.sum(dim=1) + (0 if averaged is None else averaged.sum(dim=1)), targets)
    terms = {"label": label}
    loss = label
    if intra and averaged is not None:
        terms["intra"] = intra_group(logits, averaged, reduction=reduction, teacher=teacher)
        loss = loss + intra * terms["intra"]
    if inter and logits.shape[1] > 1:
        terms["inter"] = inter_group(logits, reduction=reduction, center=center)
        loss = loss + inter * terms["inter"]
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def check(reduction: str, *, teacher: str = "tokens", center: str = "logits", total: str = "per_group") -> None:
    """Raise UserError for an unknown name."""
    for key, value, known in (
        ("reduction", reduction, REDUCTIONS),
        ("teacher", teacher, TEACHERS),
        ("center", center, CENTERS),
        ("total", total, TOTALS),
    ):
        if value not in known:
            raise UserError(f"map: {key}={value!r} is unknown: choose {' or '.join(known)}")


def _sum(logs: Tensor, student_logits: Tensor, reduction: str) -> Tensor:
    student = torch.log_softmax(at_least_float32(student_logits), dim=-1)
    rows = logs.exp() * (logs - student)
    return rows.sum() / (student.shape[-2] * (student.shape[-1] if reduction == "mean_elements" else 1))

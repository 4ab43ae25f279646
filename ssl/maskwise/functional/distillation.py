"""What groups of tokens learn from one another: MAP's two distillation terms and its total loss, in at least float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskwise.functional.errors import UserError

REDUCTIONS = ("mean_elements", "batchmean")
TEACHERS = ("tokens", "averaged")
CENTERS = ("logits", "probabilities")
TOTALS = ("per_group", "sum")


def divergence(teacher_logits: Tensor, student_logits: Tensor, reduction: str = "mean_elements") -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of rows [..., B, C], summed -> scalar; the teacher carries no gradient.

    reduction: divided by B * C ("mean_elements", as the reference: 1 / C of what it seems) or by B ("batchmean").
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        logs = torch.log_softmax(_full(teacher_logits.detach()), dim=-1)
        return _sum(logs, student_logits, reduction)


def intra_group(logits: Tensor, averaged: Tensor, *, reduction: str = "mean_elements", teacher: str = "tokens") -> Tensor:
    """Between a group's tokens and its averaged token, summed over groups: [B, G, C], [B, G, C] -> scalar.

    teacher "tokens": KL(p of the tokens || p of the averaged one), and the averaged token learns (MAP eq. 3 and the reference);
    "averaged": the averaged token teaches the tokens (MAP 4.2.2 in words). pooling.md 3.2.
    """
    check(reduction, teacher=teacher)
    logits, averaged = logits.transpose(0, 1), averaged.transpose(0, 1)
    return divergence(logits, averaged, reduction) if teacher == "tokens" else divergence(averaged, logits, reduction)


def inter_group(logits: Tensor, *, reduction: str = "mean_elements", center: str = "logits") -> Tensor:
    """From what all groups say together to what each says, summed over groups: [B, G, C] -> scalar; 0 for one group.

    KL(p* || p_g), p* without gradient: the softmax of the mean "logits" (the reference), or the mean of the groups'
    "probabilities" (MAP eq. 4); these are not equal. To be given a negative weight: groups are to differ. pooling.md 3.2.
    """
    check(reduction, center=center)
    with torch.autocast(logits.device.type, enabled=False):
        groups = _full(logits.transpose(0, 1))
        together = groups.detach()
        logs = together.mean(dim=0).log_softmax(dim=-1) if center == "logits" else together.softmax(dim=-1).mean(dim=0).log()
        return _sum(logs, groups, reduction)


def map_loss(
    logits: Tensor, averaged: Tensor | None, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor], *, intra: float = 1.0,
    inter: float = -0.8, reduction: str = "mean_elements", teacher: str = "tokens", center: str = "logits", total: str = "per_group",
) -> dict[str, Tensor]:  # fmt: skip
    """MAP's objective: logits of the tokens [B, G, C], of the averaged tokens [B, G, C] or None -> {"loss", "label", "intra", "inter"}.

    label: `criterion` of each group, summed over groups, the averaged tokens without labels ("per_group", the reference), or of the
    sum over groups and averaged tokens ("sum", MAP algorithm 1). The other two come unweighted; a term of weight 0 is not
    computed. With "batchmean" and a negative weight the inter term has no lower bound. MAP eq. 5, pooling.md 3.2.
    """
    check(reduction, teacher=teacher, center=center, total=total)
    if total == "per_group":
        label = sum(criterion(group, targets) for group in logits.unbind(dim=1))
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
    """Raises UserError for a name that is none of those above."""
    for key, value, known in (("reduction", reduction, REDUCTIONS), ("teacher", teacher, TEACHERS), ("center", center, CENTERS), ("total", total, TOTALS)):
        if value not in known:
            raise UserError(f"map: {key}={value!r} is unknown: choose {' or '.join(known)}")


def _sum(logs: Tensor, student_logits: Tensor, reduction: str) -> Tensor:
    student = torch.log_softmax(_full(student_logits), dim=-1)
    rows = logs.exp() * (logs - student)
    return rows.sum() / (student.shape[-2] * (student.shape[-1] if reduction == "mean_elements" else 1))


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

"""Losses of single samples: the terms of a method's loss before the mean over the batch, without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional import keyed_random, losses
from maskwise.functional.chunked_losses import LinearLogits, TeacherProbs, chunks
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.methods.dino import DINO
from maskwise.methods.ibot import IBOT
from maskwise.methods.mst import MST
from maskwise.methods.student_teacher import StudentTeacher, TeacherOutput
from maskwise.methods.supervised import DROPOUT, Supervised

PIXEL_DIFFERENCES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


@torch.no_grad()
def sample_losses(
    method: nn.Module,
    first: Tensor,
    second: Tensor | None,
    *,
    step: int,
    epoch: int,
    sample_ids: Tensor,
    teacher: TeacherOutput | None,
) -> dict[str, Tensor]:
    """Return the losses of the samples of a (micro-)batch by name, [B] each; {} for a method of another kind.

    first, second: arguments of the method's `forward`; teacher: its completed output for them. The mean of each loss
    over B is that of `forward`, up to terms that only a batch has.
    """
    if isinstance(method, Supervised):
        return supervised_losses(method, first, second, step=step, sample_ids=sample_ids)
    if teacher is None or not isinstance(method, (DINO, IBOT)):
        return {}
    terms = ibot_losses if isinstance(method, IBOT) else mst_losses if isinstance(method, MST) else dino_losses
    found = terms(method, first, second, step=step, epoch=epoch, sample_ids=sample_ids, teacher=teacher)
    weights = {
        "cls": method.lambda1,
        "patch": getattr(method, "lambda2", 0.0),
        "visible": getattr(method, "visible_weight", 0.0),
        "pixel": getattr(method, "pixel_weight", 0.0),
    }
    return {"loss": sum(weights[name] * value for name, value in found.items()), **found}


def dino_losses(method: DINO, first, second, *, step, epoch, sample_ids, teacher) -> dict[str, Tensor]:
    """Return the loss between views of each sample."""
    student = method.student_forward(first, second, teacher.masks, step, sample_ids)
    _, logits, probs = method.view_loss(student, teacher, len(sample_ids), epoch)
    return {"cls": view_pair_losses(logits, probs, method.student_temp)}


def mst_losses(method: MST, first, second, *, step, epoch, sample_ids, teacher) -> dict[str, Tensor]:
    """Return the losses between views and of the restored pixels of each sample."""
    student = method.student_forward(first, second, teacher.masks, step, sample_ids)
    _, logits, probs = method.view_loss(student, teacher, len(sample_ids), epoch)
    restored = method.decoder(student.patches, student.grid)
    with autocast_off(restored):
        pixels = PIXEL_DIFFERENCES[method.pixel_loss](
            at_least_float32(restored), at_least_float32(first), reduction="none"
        )
    per_view = pixels.flatten(1).mean(dim=1).unflatten(0, (-1, len(sample_ids)))
    return {"cls": view_pair_losses(logits, probs, method.student_temp), "pixel": per_view.mean(dim=0)}


def ibot_losses(method: IBOT, first, second, *, step, epoch, sample_ids, teacher) -> dict[str, Tensor]:
    """Return the losses between views and of the patches of each sample; a sample without such patches has 0."""
    samples, patches = len(sample_ids), {"patch": teacher.masked}
    patches |= {"visible": teacher.visible} if teacher.visible else {}
    student = method.student_forward(first, second, teacher.masks, step, sample_ids)
    tokens = student.patches.flatten(0, 1)
    rows = [student.pooled, *(tokens.index_select(0, part.indices) for part in patches.values())]
    bottleneck, *patch_bottlenecks = method.student.head.embed(torch.cat(rows)).split([len(part) for part in rows])
    weight, patch_weight = method.student.head.weights()
    teacher_weight, teacher_patch_weight = method.teacher.head.weights()
    logits = LinearLogits(bottleneck.unflatten(0, (-1, samples)), weight)
    probs = method.teacher_probs(teacher, teacher_weight, samples, epoch)
    found = {"cls": view_pair_losses(logits, probs, method.student_temp)}
    scale = samples
    if method.patch_loss == "token":  # as in the method's forward
        scale = samples * method.world_size * teacher.num_micro_batches
    for (name, part), patch_bottleneck in zip(patches.items(), patch_bottlenecks):
        probs = method.teacher_patch_probs(part, teacher_patch_weight, epoch)
        per_patch = token_losses(LinearLogits(patch_bottleneck, patch_weight), probs, method.student_temp)
        weights = part.weights(method.patch_loss).to(per_patch.dtype)
        places = part.indices // part.mask.shape[1] % samples  # rows are view-major
        sums = torch.zeros(samples, dtype=per_patch.dtype, device=per_patch.device)
        found[name] = sums.index_add(0, places, per_patch * weights * scale)
    return found


def supervised_losses(method: Supervised, images: Tensor, targets: Tensor, *, step, sample_ids) -> dict[str, Tensor]:
    """Return the label loss of each sample; of a classifier with several losses their mean."""
    samples, views = len(sample_ids), len(images) // len(sample_ids)
    calls: list[Tensor] = []

    def recorded(logits: Tensor, targets: Tensor) -> Tensor:
        rows = [method.criterion(logits[i::samples], targets[i : i + 1]) for i in range(samples)]
        calls.append(torch.stack(rows))
        return calls[-1].mean()

    view = torch.arange(views).repeat_interleave(samples)
    keys = keyed_random.make_key(keyed_random.DROP_PATH, method.seed, step, sample_ids.cpu().repeat(views), view)
    seed = keyed_random.make_key(DROPOUT, method.seed, step, int(sample_ids[0]))
    with keyed_random.seed_scope(int(seed)):
        features = method.student_features(images, keys.to(images.device))
        method.student.head.losses(features, targets, recorded, drop_key=keys.to(images.device))
    return {"loss": torch.stack(calls).mean(dim=0)}


def view_pair_losses(student: LinearLogits, probs: TeacherProbs, temp: float) -> Tensor:
    """Return `losses.dino_loss_from_probs` of each sample, [B], for logits [S, B, K] and probabilities [G, B, K]."""
    student = student.cast()
    views, samples, prototypes = student.shape
    teachers, rows = probs.shape[0], []
    for start, stop in chunks(samples, views * prototypes, student.weight.device):
        log_probs = torch.log_softmax(student.rows(start, stop) / temp, dim=-1)
        targets = probs.rows(start, stop)
        pairs = (targets.sum(dim=0) * log_probs.sum(dim=0)).sum(dim=-1)
        own = (targets * log_probs[:teachers]).sum(dim=-1).sum(dim=0)
        rows.append((own - pairs) / (teachers * (views - 1)))
    return torch.cat(rows)


def token_losses(student: LinearLogits, probs: TeacherProbs, temp: float) -> Tensor:
    """Return the cross-entropy of each row, [M], for logits and probabilities [M, K]."""
    student = student.cast()
    rows, prototypes = student.shape
    parts = [torch.zeros(0, device=student.weight.device)]
    for start, stop in chunks(rows, prototypes, student.weight.device):
        parts.append(losses.cross_entropy(student.rows(start, stop), probs.rows(start, stop), temp))
    return torch.cat(parts) if rows else parts[0]


def completed_teachers(method: nn.Module, batches: list[tuple], *, step: int, epoch: int) -> list[TeacherOutput | None]:
    """Return the teacher's completed output of each micro-batch of a step, None for a method without a teacher's pass.

    batches: (first, second, sample ids) of each. The centers' next update is left as it was.
    """
    if not isinstance(method, StudentTeacher):
        return [None] * len(batches)
    outputs = [
        method.teacher_forward(first, second, step=step, epoch=epoch, sample_ids=ids) for first, second, ids in batches
    ]
    method.centers.discard()
    return method.share_targets(outputs, epoch)

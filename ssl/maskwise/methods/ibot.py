"""iBOT: the DINO loss plus the same loss on masked patch tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from maskwise.bounds import Count, NonNegative, NonNegativeInt
from maskwise.errors import UserError
from maskwise.functional import collapse, losses, schedules
from maskwise.functional.chunked_losses import CenteredProbs, LinearLogits, TeacherProbs, WholeProbs
from maskwise.functional.precision import at_least_float32
from maskwise.methods.masking import Masking
from maskwise.methods.patches import PatchTargets, patch_loss, select_patches, visible_patches, zero_pad
from maskwise.methods.student_teacher import StudentTeacher, TeacherOutput


class IBOT(StudentTeacher):
    """Self-distillation between views and of masked patches (iBOT, Zhou et al. 2022), with any masking.

    Beyond StudentTeacher: `lambda2` weighs the patch loss; nothing is masked before `start_epoch`, from which the patch
    temperature warms up from `warmup_patch_temp` to `patch_temp` over `warmup_patch_temp_epochs` (None: as for crops).
    `patch_loss` is "image", the mean over each image's masked patches, then over all images, an unmasked one counting 0
    (iBOT, eq. 3, and its code), or "token", the mean over all masked patches of all ranks. `visible_weight` weighs the
    same loss with the complement of the masks (eq. 2 with 1 - m), from `start_epoch` on, its Sinkhorn-Knopp targets
    apart. `pad_multiple` pads the number of patches to a multiple, so that it takes few values; it changes no result.
    """

    has_patch_loss = True
    student_reads_patches = True
    teacher_reads_patches = True

    def __init__(
        self,
        encoder,
        head,
        masking: Masking,
        *,
        lambda2: NonNegative = 1.0,
        patch_temp: float = 0.07,
        warmup_patch_temp: float = 0.04,
        warmup_patch_temp_epochs: int | None = None,
        start_epoch: NonNegativeInt = 0,
        patch_loss: Literal["image", "token"] = "image",
        visible_weight: NonNegative = 0.0,
        pad_multiple: Count = 1,
        **options,
    ):
        super().__init__(encoder, head, masking=masking, **options)
        if patch_loss not in ("image", "token"):
            raise UserError(f"method.patch_loss={patch_loss!r} is unknown: choose one of image, token")
        self.lambda2 = lambda2
        self.patch_temp = patch_temp
        self.warmup_patch_temp = warmup_patch_temp
        own = warmup_patch_temp_epochs
        self.warmup_patch_temp_epochs = self.warmup_teacher_temp_epochs if own is None else own
        self.start_epoch = start_epoch
        self.patch_loss = patch_loss
        self.visible_weight = visible_weight
        self.pad_multiple = pad_multiple

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        *,
        step: int,
        epoch: int,
        sample_ids: Tensor,
        teacher: TeacherOutput | None = None,
        statistics: bool = False,
    ) -> dict[str, Tensor]:
        """Return the losses of one batch; changes no buffer. Arguments and errors as DINO's forward."""
        # 1. The teacher sees the unmasked global crops; its attention chooses the masks (AttMask, sec. 3.2).
        if teacher is None:
            teacher = self.teacher_targets(global_crops, local_crops, step=step, epoch=epoch, sample_ids=sample_ids)
        samples, patches = len(sample_ids), {"patch": teacher.masked}
        patches |= {"visible": teacher.visible} if teacher.visible else {}
        weight, patch_weight = self.teacher.head.weights()
        probs = self.teacher_probs(teacher, weight, samples, epoch)
        patch_probs = {name: self.teacher_patch_probs(part, patch_weight, epoch) for name, part in patches.items()}

        # 2. The student sees the masked global crops and all local crops.
        student = self.student_forward(global_crops, local_crops, teacher.masks, step, sample_ids)
        tokens = student.patches.flatten(0, 1)
        rows = [student.pooled, *(tokens.index_select(0, part.indices) for part in patches.values())]
        bottleneck, *patch_bottlenecks = self.student.head.embed(torch.cat(rows)).split([len(part) for part in rows])
        weight, patch_weight = self.student.head.weights()
        logits = LinearLogits(bottleneck.unflatten(0, (-1, samples)), weight)
        patch_logits = [LinearLogits(part, patch_weight) for part in patch_bottlenecks]

        # 3. Cross-entropy between views, and between patches of student and teacher (iBOT, eq. 2 and 3).
        cls_loss = losses.dino_loss_from_probs(logits, probs, self.student_temp)
        parts = self.world_size * teacher.num_micro_batches
        terms = {
            name: patch_loss(z, patch_probs[name], patches[name], self.student_temp, self.patch_loss, parts)
            for name, z in zip(patches, patch_logits)
        }
        loss = self.lambda1 * cls_loss + self.lambda2 * terms["patch"]
        loss = loss + self.visible_weight * terms.get("visible", 0.0)
        terms |= self.koleo_loss(student, teacher, samples)
        loss = self.add_koleo(loss, terms, teacher, samples)
        result = self.result(loss, cls_loss, terms.pop("patch"), teacher, **terms)
        if statistics:
            weights = teacher.masked.weights(self.patch_loss)
            result.update(self.collapse_statistics(logits, probs, teacher))
            result.update(collapse.patch_statistics(patch_probs["patch"], weights))
        return result

    @torch.no_grad()
    def teacher_forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> TeacherOutput:
        """Return the teacher's outputs and the masks of a (micro-)batch; arguments and errors as `forward`."""
        views = self.split_views(global_crops, local_crops, sample_ids)
        features = self.teacher_features(global_crops)
        started = epoch >= self.start_epoch
        masks = self.sample_masks(features, views, step, sample_ids, started=started)
        tokens = torch.cat([features.pooled, features.patches.flatten(0, 1)])
        bottleneck = at_least_float32(self.teacher.head.embed(tokens))
        cls_bottleneck, patch_bottleneck = bottleneck.tensor_split([len(features.pooled)])
        self.accumulate_centers(step, cls_bottleneck, patch_bottleneck)
        masked, visible = select_patches(masks, patch_bottleneck, self.pad_multiple), None
        if self.visible_weight:
            visible = select_patches(visible_patches(masks, started), patch_bottleneck, self.pad_multiple)
        # a copy of the crops' bottlenecks lets go of those of all patches
        pooled, inputs = features.pooled, (global_crops, step, sample_ids)
        return TeacherOutput(pooled, cls_bottleneck.clone(), masks, masked, visible, student_inputs=inputs)

    def share_targets(self, outputs: list[TeacherOutput], epoch: int) -> list[TeacherOutput]:
        """Add to the outputs of a step's micro-batches what depends on all of them, for crops and for patches."""
        outputs = super().share_targets(outputs, epoch)
        for name in ("masked", "visible") if self.visible_weight else ("masked",):
            shared = self.share_patch_targets([getattr(output, name) for output in outputs], epoch)
            outputs = [output._replace(**{name: patches}) for output, patches in zip(outputs, shared)]
        return outputs

    def share_patch_targets(self, parts: list[PatchTargets], epoch: int) -> list[PatchTargets]:
        """Return the patches of a step's micro-batches with Sinkhorn-Knopp targets, and their number if it divides."""
        if self.targets == "sinkhorn":
            bottlenecks = [part.bottleneck[: part.count] for part in parts]
            probs = self.sinkhorn(bottlenecks, self.teacher.head.classify_patches, self.patch_temperature(epoch))
            parts = [part._replace(probs=zero_pad(p, len(part.indices))) for part, p in zip(parts, probs)]
        if self.patch_loss == "token":
            like = parts[0].bottleneck
            count = sum(part.count for part in parts)
            total = self.all_sum(torch.full((), count, dtype=like.dtype, device=like.device))
            parts = [part._replace(total=total) for part in parts]
        return parts

    def patch_temperature(self, epoch: int) -> float:
        """Return the teacher temperature for patches in that epoch."""
        return schedules.temperature(
            epoch, self.warmup_patch_temp, self.patch_temp, self.warmup_patch_temp_epochs, hold=self.start_epoch
        )

    def teacher_patch_probs(self, patches: PatchTargets, weight: Tensor, epoch: int) -> TeacherProbs:
        """Return the targets of patches, [M, K], for the teacher's last layer weight [K, d]."""
        if patches.probs is not None:
            return WholeProbs(patches.probs)
        logits = LinearLogits(patches.bottleneck, weight)
        return CenteredProbs(logits.cast(), self.patch_center, self.patch_temperature(epoch))

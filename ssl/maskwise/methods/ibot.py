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
from maskwise.methods.masking import Masking, SampledMasks
from maskwise.methods.student_teacher import StudentTeacher, TeacherOutput

PATCH_LOSSES = ("image", "token")


class IBOT(StudentTeacher):
    """Self-distillation between views and of masked patches (iBOT, Zhou et al. 2022), with any masking.

    Beyond StudentTeacher: `lambda2` weighs the patch loss; nothing is masked before `start_epoch`, from which the patch
    temperature warms up from `warmup_patch_temp` to `patch_temp` over `warmup_patch_temp_epochs` (None: as for crops).
    `patch_loss` is "image", the mean over each image's masked patches, then over all images, an unmasked one counting 0
    (iBOT, eq. 3, and its code), or "token", the mean over all masked patches of all ranks. `pad_multiple` pads the
    number of masked patches to a multiple, so that it takes few values; it changes no result.
    """

    has_patch_loss = True

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
        pad_multiple: Count = 1,
        **options,
    ):
        super().__init__(encoder, head, masking=masking, **options)
        if patch_loss not in PATCH_LOSSES:
            raise UserError(f"method.patch_loss={patch_loss!r} is unknown: choose one of {', '.join(PATCH_LOSSES)}")
        self.lambda2 = lambda2
        self.patch_temp = patch_temp
        self.warmup_patch_temp = warmup_patch_temp
        if warmup_patch_temp_epochs is None:
            warmup_patch_temp_epochs = self.warmup_teacher_temp_epochs
        self.warmup_patch_temp_epochs = warmup_patch_temp_epochs
        self.start_epoch = start_epoch
        self.patch_loss = patch_loss
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
        weight, patch_weight = self.teacher.head.weights()
        probs = self.teacher_probs(teacher, weight, len(sample_ids), epoch)
        patch_probs = self.teacher_patch_probs(teacher, patch_weight, epoch)

        # 2. The student sees the masked global crops and all local crops.
        student = self.student_forward(global_crops, local_crops, teacher.masks, step, sample_ids)
        masked_patches = student.patches.flatten(0, 1).index_select(0, teacher.masked_indices)
        bottleneck = self.student.head.embed(torch.cat([student.pooled, masked_patches]))
        cls_bottleneck, patch_bottleneck = bottleneck.tensor_split([len(student.pooled)])
        weight, patch_weight = self.student.head.weights()
        logits = LinearLogits(cls_bottleneck.unflatten(0, (-1, len(sample_ids))), weight)
        patch_logits = LinearLogits(patch_bottleneck, patch_weight)

        # 3. Cross-entropy between views, and between masked patches of student and teacher (iBOT, eq. 2 and 3).
        mask, total = teacher.masks.mask, teacher.num_masked_total
        cls_loss = losses.dino_loss_from_probs(logits, probs, self.student_temp)
        patch_loss = losses.ibot_loss_from_probs(
            patch_logits, patch_probs, mask, self.student_temp, self.patch_loss, total
        )
        if self.patch_loss == "token":  # the mean over ranks and micro-batches becomes that of the whole batch
            patch_loss = self.world_size * teacher.num_micro_batches * patch_loss
        loss = self.lambda1 * cls_loss + self.lambda2 * patch_loss
        if self.koleo:
            n = teacher.bottleneck.shape[0]
            loss = loss + self.koleo * losses.koleo_loss(student.pooled[:n].unflatten(0, (-1, len(sample_ids))))
        result = self.result(loss, cls_loss, patch_loss, teacher)
        if statistics:
            weights = losses.patch_weights(mask, patch_probs.shape[0], self.patch_loss, total)
            result.update(self.collapse_statistics(logits, probs, teacher))
            result.update(collapse.patch_statistics(patch_probs, weights))
        return result

    @torch.no_grad()
    def teacher_forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> TeacherOutput:
        """Return the teacher's outputs and the masks of a (micro-)batch; arguments and errors as `forward`."""
        views = self.split_views(global_crops, local_crops, sample_ids)
        features = self.teacher_features(global_crops)
        masks = self.sample_masks(features, views, step, sample_ids, started=epoch >= self.start_epoch)
        indices = self.masked_indices(masks)
        tokens = torch.cat([features.pooled, features.patches.flatten(0, 1)])
        bottleneck = at_least_float32(self.teacher.head.embed(tokens))
        cls_bottleneck, patch_bottleneck = bottleneck.tensor_split([len(features.pooled)])
        self.accumulate_centers(step, cls_bottleneck, patch_bottleneck)
        masked_bottleneck = patch_bottleneck.index_select(0, indices)
        # a copy of the crops' bottlenecks lets go of those of all patches
        return TeacherOutput(features.pooled, cls_bottleneck.clone(), masks, indices, masked_bottleneck)

    def share_targets(self, outputs: list[TeacherOutput], epoch: int) -> list[TeacherOutput]:
        """Add to the outputs of a step's micro-batches what depends on all of them.

        These are Sinkhorn-Knopp probabilities, and the number of masked patches if the loss divides by it.
        """
        outputs = super().share_targets(outputs, epoch)
        if self.targets == "sinkhorn":
            masked = [output.patch_bottleneck[: output.masks.num_masked] for output in outputs]
            probs = self.sinkhorn(masked, self.teacher.head.classify_patches, self.patch_temperature(epoch))
            padded = [zero_pad(p, len(output.masked_indices)) for output, p in zip(outputs, probs)]
            outputs = [output._replace(patch_probs=p) for output, p in zip(outputs, padded)]
        if self.patch_loss == "token":
            like = outputs[0].bottleneck
            num_masked = sum(output.masks.num_masked for output in outputs)
            total = self.all_sum(torch.full((), num_masked, dtype=like.dtype, device=like.device))
            outputs = [output._replace(num_masked_total=total) for output in outputs]
        return outputs

    def masked_indices(self, masks: SampledMasks) -> Tensor:
        """Return the indices of the masked patches among all V * N, in order, padded with others; no host sync."""
        flat = masks.mask.flatten()
        count = min(-(-masks.num_masked // self.pad_multiple) * self.pad_multiple, len(flat))
        return torch.argsort(~flat, stable=True)[:count]

    def patch_temperature(self, epoch: int) -> float:
        """Return the teacher temperature for patches in that epoch."""
        return schedules.temperature(
            epoch, self.warmup_patch_temp, self.patch_temp, self.warmup_patch_temp_epochs, hold=self.start_epoch
        )

    def teacher_patch_probs(self, teacher: TeacherOutput, weight: Tensor, epoch: int) -> TeacherProbs:
        """Return the targets of the masked patches, [M, K], for the teacher's last layer weight [K, d]."""
        if teacher.patch_probs is not None:
            return WholeProbs(teacher.patch_probs)
        logits = LinearLogits(teacher.patch_bottleneck, weight)
        return CenteredProbs(logits.cast(), self.patch_center, self.patch_temperature(epoch))


def zero_pad(probs: Tensor, rows: int) -> Tensor:
    """Append rows of zeros to [m, K] until there are `rows`."""
    return torch.cat([probs, probs.new_zeros(rows - len(probs), probs.shape[1])])

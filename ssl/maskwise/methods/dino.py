"""DINO: match each student view to every other global view of the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwise.functional import losses
from maskwise.functional.chunked_losses import LinearLogits, TeacherProbs
from maskwise.methods.student_teacher import StudentOutput, StudentTeacher, TeacherOutput


class DINO(StudentTeacher):
    """Self-distillation between views (DINO, Caron et al. 2021); with a masking, DINO on masked crops.

    Arguments as StudentTeacher; temperatures are constant within an epoch, `lambda1` weighs the loss.
    """

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
        """Return the losses of one batch; changes no buffer.

        global_crops [G * B, 3, S, S] and local_crops [L * B, 3, s, s], normalized floats, crop-major; sample_ids
        int64 [B], preferably on the CPU. `teacher` is this micro-batch's output of `share_targets`, by default that of
        a batch of its own; `statistics` adds collapse statistics. Raises UserError for G = 1, L = 0.
        """
        if teacher is None:
            teacher = self.teacher_targets(global_crops, local_crops, step=step, epoch=epoch, sample_ids=sample_ids)
        student = self.student_forward(global_crops, local_crops, teacher.masks, step, sample_ids)
        cls_loss, logits, probs = self.view_loss(student, teacher, len(sample_ids), epoch)
        loss = self.lambda1 * cls_loss
        if self.koleo:
            n = teacher.bottleneck.shape[0]
            loss = loss + self.koleo * losses.koleo_loss(student.pooled[:n].unflatten(0, (-1, len(sample_ids))))
        result = self.result(loss, cls_loss, torch.zeros_like(cls_loss), teacher)
        return {**result, **self.collapse_statistics(logits, probs, teacher)} if statistics else result

    def view_loss(
        self, student: StudentOutput, teacher: TeacherOutput, samples: int, epoch: int
    ) -> tuple[Tensor, LinearLogits, TeacherProbs]:
        """Return the loss between views, the student's logits [S, B, K] and the teacher's targets [G, B, K]."""
        bottleneck = self.student.head.embed(student.pooled).unflatten(0, (-1, samples))
        logits = LinearLogits(bottleneck, self.student.head.weights()[0])
        probs = self.teacher_probs(teacher, self.teacher.head.weights()[0], samples, epoch)
        return losses.dino_loss_from_probs(logits, probs, self.student_temp), logits, probs

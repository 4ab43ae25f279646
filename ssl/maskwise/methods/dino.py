"""DINO: the student's every view foretells the teacher's every other global view."""

import torch
from torch import Tensor

from maskwise.functional import losses
from maskwise.methods.student_teacher import StudentTeacher, full_precision, wide


class DINO(StudentTeacher):
    """Self-distillation between views (Caron et al. 2021; attmask.md 1.3-1.6); with a masking, DINO on masked crops.

    Arguments as StudentTeacher: temperatures are constant inside an epoch, `lambda1` weighs the image term.
    """

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses and health of one batch; changes no buffer.

        global_crops [G * B, 3, S, S] and local_crops [L * B, 3, s, s], normalised floats, crop-major; sample_ids
        int64 [B], best on the CPU. Raises UserError for G = 1, L = 0.
        """
        views = self.count_views(global_crops, local_crops, sample_ids)
        features = self.look(global_crops)
        hidden = self.hide(features, views, step, sample_ids)
        _, pooled = self.study(global_crops, local_crops, hidden, views, step, sample_ids)
        with torch.no_grad():
            teacher_z = self.teacher.head.embed(features.pooled)
            teacher_logits = self.teacher.head.classify(teacher_z)
        student_logits = self.student.head(pooled)
        with full_precision(pooled.device.type):
            self.remember(step, wide(teacher_z))
            probs = self.aim(wide(teacher_logits), self.center, self.cls_temperature(epoch)).unflatten(0, (views.global_, views.samples))
            logits = wide(student_logits).unflatten(0, (-1, views.samples))
            cls = losses.dino_loss_from_probs(logits, probs, self.student_temp)
            return self.report(self.lambda1 * cls, cls, torch.zeros_like(cls), features, probs, logits, hidden)

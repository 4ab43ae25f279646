"""DINO: the student's every view foretells the teacher's every other global view."""

import torch
from torch import Tensor

from maskwise.methods.lesson import Lesson
from maskwise.methods.student_teacher import StudentTeacher


class DINO(StudentTeacher):
    """Self-distillation between views (Caron et al. 2021; attmask.md 1.3-1.6); with a masking, DINO on masked crops.

    Arguments as StudentTeacher: temperatures are constant inside an epoch, `lambda1` weighs the image term.
    """

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor, lesson: Lesson | None = None
    ) -> dict[str, Tensor]:
        """Return the losses and health of one batch; changes no buffer.

        global_crops [G * B, 3, S, S] and local_crops [L * B, 3, s, s], normalised floats, crop-major; sample_ids
        int64 [B], best on the CPU; `lesson` is what `teach` and `agree` made of this micro-batch, of one batch alone if
        None. Raises UserError for G = 1, L = 0.
        """
        if lesson is None:
            [lesson] = self.agree([self.teach(global_crops, local_crops, step=step, epoch=epoch, sample_ids=sample_ids)], epoch)
        views = self.count_views(global_crops, local_crops, sample_ids)
        _, pooled = self.study(global_crops, local_crops, lesson.hidden, views, step, sample_ids)
        z = self.student.head.embed(pooled)
        cls, health = self.image_term(z, self.student.head.weights()[0], lesson, views, epoch)
        return self.report(self.lambda1 * cls, cls, torch.zeros_like(cls), health, lesson)

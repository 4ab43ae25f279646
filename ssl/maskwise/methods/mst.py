"""MST: DINO on crops whose least attended patches are hidden, and a decoder that paints the whole crop again."""

import torch
from torch import Tensor
from torch.nn import functional as F

from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.methods.lesson import Lesson
from maskwise.methods.student_teacher import StudentTeacher, full_precision, wide
from maskwise.nn.pixel_decoder import PixelDecoder

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
DECODER = 2  # encoder and head take the seed and the one after it


class MST(StudentTeacher):
    """DINO, and the student's patches of each masked global crop give back all its pixels (Li et al. 2021, as we read one table row).

    Beyond StudentTeacher: `pixel_weight` weighs the mean absolute ("l1") or squared ("l2") difference, `pixel_loss`, between the
    decoder's image and the normalised crop, over all patches, hidden or not. The masking is meant to be attmask_low. The
    decoder belongs to the student alone: the teacher has none and no export holds it. Its first weights follow from `seed`.
    """

    def __init__(self, encoder, head, *, pixel_weight: float = 1.0, pixel_loss: str = "l1", seed: int = 0, **options):
        super().__init__(encoder, head, seed=seed, **options)
        if pixel_loss not in PIXEL_LOSSES:
            raise UserError(f"method.pixel_loss={pixel_loss!r} is unknown: choose one of {', '.join(PIXEL_LOSSES)}")
        self.pixel_weight = pixel_weight
        self.pixel_loss = pixel_loss
        with draws.seeded(seed + DECODER):
            self.decoder = PixelDecoder(encoder.dim, encoder.backbone.patch_size)

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor, lesson: Lesson | None = None
    ) -> dict[str, Tensor]:
        """Return the losses and health of one batch, `pixel` among them; changes no buffer. Arguments and errors as DINO's forward."""
        if lesson is None:
            [lesson] = self.agree([self.teach(global_crops, local_crops, step=step, epoch=epoch, sample_ids=sample_ids)], epoch)
        views = self.count_views(global_crops, local_crops, sample_ids)
        seen, pooled = self.study(global_crops, local_crops, lesson.hidden, views, step, sample_ids)
        cls, health = self.image_term(self.student.head.embed(pooled), self.student.head.weights()[0], lesson, views, epoch)
        painted = self.decoder(seen.patches, seen.grid)
        with full_precision(pooled.device.type):
            pixel = PIXEL_LOSSES[self.pixel_loss](wide(painted), wide(global_crops))
        loss = self.lambda1 * cls + self.pixel_weight * pixel
        return {**self.report(loss, cls, torch.zeros_like(cls), health, lesson), "pixel": pixel.detach()}

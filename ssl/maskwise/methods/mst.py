"""MST: DINO on crops whose least attended patches are hidden, and a decoder that paints the whole crop again."""

import torch
from torch import Tensor
from torch.nn import functional as F

from maskwise.functional import draws, losses
from maskwise.functional.errors import UserError
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
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses and health of one batch, `pixel` among them; changes no buffer.

        global_crops [G * B, 3, S, S] and local_crops [L * B, 3, s, s], normalised floats, crop-major; sample_ids
        int64 [B], best on the CPU. Raises UserError for G = 1, L = 0.
        """
        views = self.count_views(global_crops, local_crops, sample_ids)
        features = self.look(global_crops)
        hidden = self.hide(features, views, step, sample_ids)
        seen, pooled = self.study(global_crops, local_crops, hidden, views, step, sample_ids)
        with torch.no_grad():
            teacher_z = self.teacher.head.embed(features.pooled)
            teacher_logits = self.teacher.head.classify(teacher_z)
        student_logits = self.student.head(pooled)
        painted = self.decoder(seen.patches, seen.grid)
        with full_precision(pooled.device.type):
            self.remember(step, wide(teacher_z))
            probs = self.aim(wide(teacher_logits), self.center, self.cls_temperature(epoch)).unflatten(0, (views.global_, views.samples))
            logits = wide(student_logits).unflatten(0, (-1, views.samples))
            cls = losses.dino_loss_from_probs(logits, probs, self.student_temp)
            pixel = PIXEL_LOSSES[self.pixel_loss](wide(painted), wide(global_crops))
            loss = self.lambda1 * cls + self.pixel_weight * pixel
            return {**self.report(loss, cls, torch.zeros_like(cls), features, probs, logits, hidden), "pixel": pixel.detach()}

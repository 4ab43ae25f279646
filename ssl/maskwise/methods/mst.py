"""MST: DINO on crops whose least attended patches are masked, plus a decoder that restores the whole crop."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from maskwise.bounds import NonNegative
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.methods.dino import DINO
from maskwise.methods.student_teacher import TeacherOutput
from maskwise.nn.pixel_decoder import PixelDecoder

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
DECODER = 2  # encoder and head take the seed and the one after it


class MST(DINO):
    """DINO plus a loss on the pixels of the whole crop, restored from the masked crop (MST, Li et al. 2021).

    Beyond DINO: `pixel_weight` weighs the mean absolute ("l1") or squared ("l2") difference, `pixel_loss`,
    between the decoder's image and the normalized crop, over all patches, masked or not. Meant for masking attmask_low.
    Only the student has a decoder, and no export contains it; its initial weights follow from `seed`.
    """

    student_reads_patches = True

    def __init__(
        self,
        encoder,
        head,
        *,
        pixel_weight: NonNegative = 1.0,
        pixel_loss: Literal["l1", "l2"] = "l1",
        seed: int = 0,
        **options,
    ):
        super().__init__(encoder, head, seed=seed, **options)
        if pixel_loss not in PIXEL_LOSSES:
            raise UserError(f"method.pixel_loss={pixel_loss!r} is unknown: choose one of {', '.join(PIXEL_LOSSES)}")
        self.pixel_weight = pixel_weight
        self.pixel_loss = pixel_loss
        with keyed_random.seed_scope(seed + DECODER):
            self.decoder = PixelDecoder(encoder.dim, encoder.backbone.patch_size)

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
        """Return the losses of one batch, `pixel` among them; changes no buffer. Arguments and errors as DINO's."""
        if teacher is None:
            teacher = self.teacher_targets(global_crops, local_crops, step=step, epoch=epoch, sample_ids=sample_ids)
        student = self.student_forward(global_crops, local_crops, teacher.masks, step, sample_ids)
        cls_loss, logits, probs = self.view_loss(student, teacher, len(sample_ids), epoch)
        restored = self.decoder(student.patches, student.grid)
        with autocast_off(restored):
            pixel_loss = PIXEL_LOSSES[self.pixel_loss](at_least_float32(restored), at_least_float32(global_crops))
        koleo = self.koleo_loss(student, teacher, len(sample_ids))
        loss = self.lambda1 * cls_loss + self.pixel_weight * pixel_loss
        loss = self.add_koleo(loss, koleo, teacher, len(sample_ids))
        result = self.result(loss, cls_loss, torch.zeros_like(cls_loss), teacher, pixel=pixel_loss, **koleo)
        return {**result, **self.collapse_statistics(logits, probs, teacher)} if statistics else result

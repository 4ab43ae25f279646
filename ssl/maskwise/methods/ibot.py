"""iBOT: DINO, and the student also foretells the teacher's view of each patch it cannot see."""

import torch
from torch import Tensor

from maskwise.functional import losses, schedules
from maskwise.functional.errors import UserError
from maskwise.methods.masking import Hidden, Masking
from maskwise.methods.student_teacher import StudentTeacher, full_precision, wide

PATCH_LOSSES = ("image", "token")


class IBOT(StudentTeacher):
    """Self-distillation between views and of masked patches (Zhou et al. 2022; with AttMask, Kakogeorgiou et al. 2022).

    Beyond StudentTeacher: `lambda2` weighs the patch term; the patch temperature warms from `warmup_patch_temp` to
    `patch_temp` over `warmup_patch_temp_epochs` (the image term's if None) once `start_epoch` is reached, and before
    that nothing is masked; `patch_loss` is "image" (mean over each image's masked patches, then over all images, an
    unmasked one counting 0, attmask.md 1.4) or "token" (mean over all masked patches of all ranks). `pad_rows` rounds
    the number of patch rows up to a multiple, to keep shapes few; it changes no result.
    """

    def __init__(
        self,
        encoder,
        head,
        masking: Masking,
        *,
        lambda2: float = 1.0,
        patch_temp: float = 0.07,
        warmup_patch_temp: float = 0.04,
        warmup_patch_temp_epochs: int | None = None,
        start_epoch: int = 0,
        patch_loss: str = "image",
        pad_rows: int = 1,
        **options,
    ):
        super().__init__(encoder, head, masking=masking, **options)
        if patch_loss not in PATCH_LOSSES:
            raise UserError(f"method.patch_loss={patch_loss!r} is unknown: choose one of {', '.join(PATCH_LOSSES)}")
        self.lambda2 = lambda2
        self.patch_temp = patch_temp
        self.warmup_patch_temp = warmup_patch_temp
        self.warmup_patch_temp_epochs = self.warmup_teacher_temp_epochs if warmup_patch_temp_epochs is None else warmup_patch_temp_epochs
        self.start_epoch = start_epoch
        self.patch_loss = patch_loss
        self.pad_rows = pad_rows

    def patch_temperature(self, epoch: int) -> float:
        """Return the teacher's temperature of the patch term in that epoch (attmask.md 1.6)."""
        return schedules.temperature(
            epoch, self.warmup_patch_temp, self.patch_temp, self.warmup_patch_temp_epochs, hold=self.start_epoch
        )

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses and health of one batch; changes no buffer.

        global_crops [G * B, 3, S, S] and local_crops [L * B, 3, s, s], normalised floats, crop-major; sample_ids
        int64 [B], best on the CPU. Raises UserError for G = 1, L = 0.
        """
        views = self.count_views(global_crops, local_crops, sample_ids)
        features = self.look(global_crops)
        hidden = self.hide(features, views, step, sample_ids, start=epoch >= self.start_epoch)
        rows = self.hidden_rows(hidden)
        seen, pooled = self.study(global_crops, local_crops, hidden, views, step, sample_ids)
        with torch.no_grad():
            head, whole = self.teacher.head, len(features.pooled)
            z = head.embed(torch.cat([features.pooled, features.patches.flatten(0, 1)]))
            teacher_z, teacher_patch_z = z[:whole], z[whole:]
            teacher_logits = head.classify(teacher_z)
            teacher_patch_logits = head.classify_patches(teacher_patch_z.index_select(0, rows))
        head, whole = self.student.head, len(pooled)
        z = head.embed(torch.cat([pooled, seen.patches.flatten(0, 1).index_select(0, rows)]))
        student_logits = head.classify(z[:whole])
        student_patch_logits = head.classify_patches(z[whole:])
        with full_precision(pooled.device.type):
            self.remember(step, wide(teacher_z), wide(teacher_patch_z))
            probs = self.aim(wide(teacher_logits), self.center, self.cls_temperature(epoch)).unflatten(0, (views.global_, views.samples))
            logits = wide(student_logits).unflatten(0, (-1, views.samples))
            cls = losses.dino_loss_from_probs(logits, probs, self.student_temp)
            patch_probs = self.aim_patches(wide(teacher_patch_logits), hidden.count, self.patch_temperature(epoch))
            patch = self.patch_term(wide(student_patch_logits), patch_probs, hidden)
            loss = self.lambda1 * cls + self.lambda2 * patch
            return self.report(loss, cls, patch, features, probs, logits, hidden)

    def hidden_rows(self, hidden: Hidden) -> Tensor:
        """Return the indices of the hidden patches among all V * N, in order, padded with others; the host waits for nothing."""
        flat = hidden.mask.flatten()
        count = min(-(-hidden.count // self.pad_rows) * self.pad_rows, len(flat))
        return torch.argsort(~flat, stable=True)[:count]

    def aim_patches(self, logits: Tensor, count: int, temp: float) -> Tensor:
        """Turn the teacher's patch logits [n, K], of which the first `count` are of hidden patches, into targets [n, K]."""
        probs = self.aim(logits[:count], self.patch_center, temp)
        return torch.cat([probs, probs.new_zeros(len(logits) - count, probs.shape[1])])

    def patch_term(self, logits: Tensor, probs: Tensor, hidden: Hidden) -> Tensor:
        """Return the patch loss of this rank; the mean over ranks is that of the whole batch, whichever the reduction."""
        if self.patch_loss == "image":
            return losses.ibot_loss_from_probs(logits, probs, hidden.mask, self.student_temp, "image")
        total = self.all_sum(torch.full((), hidden.count, dtype=probs.dtype, device=probs.device))
        return self.world_size * losses.ibot_loss_from_probs(logits, probs, hidden.mask, self.student_temp, "token", total)

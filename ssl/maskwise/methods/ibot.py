"""iBOT: DINO, and the student also foretells the teacher's view of each patch it cannot see."""

import torch
from torch import Tensor

from maskwise.functional import prototypes, schedules
from maskwise.functional.errors import UserError
from maskwise.functional.losses import patch_weights
from maskwise.methods.lesson import Lesson
from maskwise.methods.masking import Hidden, Masking
from maskwise.methods.student_teacher import StudentTeacher, full_precision, product_dtype, wide

PATCH_LOSSES = ("image", "token")
WATCHED = 1024  # hidden patches, about, whose targets are looked at for signs of collapse


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

    @torch.no_grad()
    def teach(self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor) -> Lesson:
        """Return the teacher's side of a (micro-)batch; arguments as `forward`. Raises UserError for G = 1, L = 0."""
        views = self.count_views(global_crops, local_crops, sample_ids)
        features = self.look(global_crops)
        hidden = self.hide(features, views, step, sample_ids, start=epoch >= self.start_epoch)
        rows = self.hidden_rows(hidden)
        whole = len(features.pooled)
        z = wide(self.teacher.head.embed(torch.cat([features.pooled, features.patches.flatten(0, 1)])))
        teacher_z, teacher_patch_z = z[:whole], z[whole:]
        with full_precision(z.device.type):
            self.remember(step, teacher_z, teacher_patch_z)
        return Lesson(features.pooled, teacher_z.clone(), hidden, rows, teacher_patch_z.index_select(0, rows))

    def agree(self, lessons: list[Lesson], epoch: int) -> list[Lesson]:
        """Add to the lessons of a step's micro-batches what only all of them together can tell."""
        lessons = super().agree(lessons, epoch)
        if self.targets == "sinkhorn":
            z = [lesson.patch_z[: lesson.hidden.count] for lesson in lessons]
            aims = self._aims_of_all(z, self.teacher.head.classify_patches, self.patch_center, self.patch_temperature(epoch))
            lessons = [lesson._replace(patch_aims=_padded(each, len(lesson.rows))) for lesson, each in zip(lessons, aims)]
        if self.patch_loss == "token":
            z = lessons[0].z
            total = self.all_sum(torch.full((), sum(lesson.hidden.count for lesson in lessons), dtype=z.dtype, device=z.device))
            lessons = [lesson._replace(tokens=total) for lesson in lessons]
        return lessons

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
        seen, pooled = self.study(global_crops, local_crops, lesson.hidden, views, step, sample_ids)
        whole = len(pooled)
        z = self.student.head.embed(torch.cat([pooled, seen.patches.flatten(0, 1).index_select(0, lesson.rows)]))
        weight, patch_weight = self.student.head.weights()
        cls, health = self.image_term(z[:whole], weight, lesson, views, epoch)
        patch, more = self.patch_term(z[whole:], patch_weight, lesson, epoch)
        return self.report(self.lambda1 * cls + self.lambda2 * patch, cls, patch, {**health, **more}, lesson)

    def hidden_rows(self, hidden: Hidden) -> Tensor:
        """Return the indices of the hidden patches among all V * N, in order, padded with others; the host waits for nothing."""
        flat = hidden.mask.flatten()
        count = min(-(-hidden.count // self.pad_rows) * self.pad_rows, len(flat))
        return torch.argsort(~flat, stable=True)[:count]

    def patch_term(self, z: Tensor, weight: Tensor, lesson: Lesson, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the patch loss of this (micro-)batch and what it shows; the mean over ranks and micro-batches is that of the whole batch.

        z [M, d] are the student's bottlenecks of the hidden patches, weight [K, d] its last layer for patches. patch_entropy and
        patch_spread are those of `image_term`, of about a thousand hidden patches, weighed as in the loss; 0 where nothing is hidden.
        """
        dtype, head_weight = product_dtype(z), self.teacher.head.weights()[1].to(product_dtype(z))
        teacher_z, temp = lesson.patch_z.to(dtype), self.patch_temperature(epoch)

        def probs(start, stop):
            if lesson.patch_aims is not None:
                return lesson.patch_aims[start:stop]
            return self.aim(wide(teacher_z[start:stop] @ head_weight.T), self.patch_center, temp)

        stride, seen = max(1, len(z) // WATCHED), []

        def watch(aims, weight):
            aims, weight = aims[::stride], weight[::stride]
            with full_precision(aims.device.type):
                seen.append((torch.special.entr(aims).sum(dim=-1) @ weight, weight @ aims, weight.sum()))

        weights = patch_weights(lesson.hidden.mask, len(z), self.patch_loss, lesson.tokens)
        term = prototypes.loss_in_pieces(z[None], weight, prototypes.score_rows(probs, weights, self.student_temp, watch), dtype)
        nothing = term.new_zeros(())
        entropy, mean, total = (torch.stack(each).sum(dim=0) for each in zip(*seen)) if seen else (nothing, nothing[None], nothing)
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        health = {"patch_entropy": entropy / total, "patch_spread": torch.special.entr(mean / total).sum()}
        return term if self.patch_loss == "image" else self.world_size * lesson.parts * term, health


def _padded(aims: Tensor, rows: int) -> Tensor:
    return torch.cat([aims, aims.new_zeros(rows - len(aims), aims.shape[1])])

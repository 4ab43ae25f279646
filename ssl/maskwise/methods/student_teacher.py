"""Student-teacher methods: two networks, centers of the teacher's logits, and the teacher's targets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskwise.bounds import NonNegative, Positive, Probability
from maskwise.errors import UserError
from maskwise.functional import collapse, ema, keyed_random, schedules, targets
from maskwise.functional.attention import patch_attention
from maskwise.functional.chunked_losses import CenteredProbs, LinearLogits, TeacherProbs, WholeProbs
from maskwise.functional.precision import at_least_float32, autocast_off
from maskwise.methods.base import EncoderWithHead, Method
from maskwise.methods.centers import Centers, use_state_names
from maskwise.methods.masking import Masking, NoMasking, SampledMasks, masking_name
from maskwise.nn.encoder import pooling_name
from maskwise.nn.pooling import with_attention

TARGETS = ("centering", "sinkhorn")


class Views(NamedTuple):
    """Division of a batch: samples B, global views G and local views L of each."""

    samples: int
    global_: int
    local: int


class TeacherOutput(NamedTuple):
    """Teacher outputs and targets for one (micro-)batch.

    Bottlenecks take the place of logits, which the last layer computes in chunks. Probabilities are None where they
    follow from bottlenecks and centers.
    """

    pooled: Tensor  # [G * B, D], features
    bottleneck: Tensor  # [G * B, d]
    masks: SampledMasks  # of the student's global crops
    masked_indices: Tensor | None = None  # [M], of the masked patches among all G * B * N
    patch_bottleneck: Tensor | None = None  # [M, d], of the masked patches
    probs: Tensor | None = None  # [G * B, K], by Sinkhorn-Knopp
    patch_probs: Tensor | None = None  # [M, K], by Sinkhorn-Knopp
    num_masked_total: Tensor | None = None  # masked patches of the whole batch of all ranks, if the loss divides by it
    num_micro_batches: int = 1


class StudentOutput(NamedTuple):
    """Student outputs for one (micro-)batch."""

    patches: Tensor  # [G * B, N, D], of the masked global crops
    grid: tuple[int, int]
    pooled: Tensor  # [S * B, D], of all crops


class StudentTeacher(Method):
    """A student, a teacher that is its moving average, and running centers of the teacher's logits.

    The teacher is a copy of the student without mask token, drop path or gradients; it stays in train mode, so that a
    batch norm uses the batch. `forward` of the subclasses changes no buffer: centers wait for `update_teacher`.
    `all_sum` sums a tensor over `world_size` ranks. Raises UserError if masking, pooling and backbone do not fit.
    """

    shares_targets = True
    has_statistics = True

    # 13 parameters: public keywords of DINO and IBOT, each a recipe key or supplied by the builder
    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        student_temp: Positive = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        center_momentum: Probability = 0.9,
        lambda1: NonNegative = 1.0,
        koleo: NonNegative = 0.0,
        targets: Literal["centering", "sinkhorn"] = "centering",
        masking: Masking | None = None,
        all_sum: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        if targets not in TARGETS:
            raise UserError(f"method.targets={targets!r} is unknown: choose one of {', '.join(TARGETS)}")
        self.masking = NoMasking() if masking is None else masking
        check_masking(self.masking, encoder)
        self.student = EncoderWithHead(encoder, head)
        self.teacher = copy.deepcopy(self.student)
        self.teacher.encoder.backbone.freeze_as_teacher_()
        self.teacher.requires_grad_(False)
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.lambda1 = lambda1
        self.koleo = koleo
        self.targets = targets
        self.all_sum = all_sum or identity
        self.world_size = world_size
        self.seed = seed
        self.centers = Centers(head.prototypes, head.patch_prototypes or head.prototypes, center_momentum)
        use_state_names(self)

    @property
    def center(self) -> Tensor:
        """Center of the teacher's logits of whole crops, [K]."""
        return self.centers.cls

    @property
    def patch_center(self) -> Tensor:
        """Center of the teacher's logits of patches, [K']."""
        return self.centers.patch

    def split_views(self, global_crops: Tensor, local_crops: Tensor | None, sample_ids: Tensor) -> Views:
        """Return how the crops divide into views; raises UserError if there is no pair of different views."""
        samples = len(sample_ids)
        views = Views(samples, len(global_crops) // samples, 0 if local_crops is None else len(local_crops) // samples)
        if views.global_ * (views.global_ + views.local - 1) == 0:
            raise UserError(
                "with one global crop and no local crops there are no two views to compare: "
                "use two global crops, or add local crops"
            )
        return views

    def cls_temperature(self, epoch: int) -> float:
        """Return the teacher temperature for whole crops in that epoch."""
        return schedules.temperature(
            epoch, self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs
        )

    @torch.no_grad()
    def teacher_features(self, global_crops: Tensor):
        """Return the teacher's features of the unmasked global crops, with attention if the masking needs it."""
        return self.teacher.encoder(global_crops, attention=self.masking.needs_attention)

    def sample_masks(
        self, features, views: Views, step: int, sample_ids: Tensor, *, started: bool = True
    ) -> SampledMasks:
        """Return masks of the student's global crops from the teacher's attention; none are masked unless `started`."""
        masking = self.masking if started else NoMasking()
        attention, queries = features.attention, self.teacher.encoder.pooling.k
        if attention is not None and queries > 1:
            attention = patch_attention(attention, queries)[:, None]
        device = features.pooled.device
        return masking.sample(
            attention, features.grid, step=step, sample_ids=sample_ids, device=device, views=views.global_
        )

    @torch.no_grad()
    def teacher_forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> TeacherOutput:
        """Return the teacher's outputs and the masks of a (micro-)batch; arguments and errors as `forward`."""
        views = self.split_views(global_crops, local_crops, sample_ids)
        features = self.teacher_features(global_crops)
        masks = self.sample_masks(features, views, step, sample_ids)
        bottleneck = at_least_float32(self.teacher.head.embed(features.pooled))
        self.accumulate_centers(step, bottleneck)
        return TeacherOutput(features.pooled, bottleneck, masks)

    def teacher_targets(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> TeacherOutput:
        """Return the completed teacher output of a batch that is a whole step; arguments and errors as `forward`."""
        output = self.teacher_forward(global_crops, local_crops, step=step, epoch=epoch, sample_ids=sample_ids)
        return self.share_targets([output], epoch)[0]

    @torch.no_grad()
    def accumulate_centers(self, step: int, bottleneck: Tensor, patch_bottleneck: Tensor | None = None) -> None:
        """Add the mean logits over all ranks, of bottlenecks [n, d] and [m, d], to the centers' next update.

        The last layer is linear without bias, so mean logits are those of the mean bottleneck.
        """
        if self.targets == "sinkhorn":
            return
        bottlenecks = [bottleneck] if patch_bottleneck is None else [bottleneck, patch_bottleneck]
        with autocast_off(bottleneck):
            means = self.all_sum(torch.cat([z.mean(dim=0) for z in bottlenecks])) / self.world_size
            cls_mean, *patch_mean = means.split(bottleneck.shape[1])
            head = self.teacher.head
            logits = [head.classify(cls_mean[None])[0], *(head.classify_patches(mean[None])[0] for mean in patch_mean)]
        self.centers.accumulate(step, logits)

    def share_targets(self, outputs: list[TeacherOutput], epoch: int) -> list[TeacherOutput]:
        """Add to the outputs of a step's micro-batches what depends on all of them: Sinkhorn-Knopp targets."""
        if self.targets == "sinkhorn":
            bottlenecks = [output.bottleneck for output in outputs]
            probs = self.sinkhorn(bottlenecks, self.teacher.head.classify, self.cls_temperature(epoch))
            outputs = [output._replace(probs=p) for output, p in zip(outputs, probs)]
        return [output._replace(num_micro_batches=len(outputs)) for output in outputs]

    @torch.no_grad()
    def sinkhorn(self, bottlenecks: list[Tensor], classify: Callable, temp: float) -> list[Tensor]:
        """Return balanced probabilities over all micro-batches and ranks, [n, K] for bottlenecks [n, d] of each."""
        logits = at_least_float32(classify(torch.cat(bottlenecks)))
        with autocast_off(logits):
            probs = targets.sinkhorn(logits, temp, all_sum=self.all_sum)
        return list(probs.split([len(z) for z in bottlenecks]))

    def student_forward(
        self, global_crops: Tensor, local_crops: Tensor | None, masks: SampledMasks, step: int, sample_ids: Tensor
    ) -> StudentOutput:
        """Return the student's outputs for the masked global crops and all local crops."""
        views = self.split_views(global_crops, local_crops, sample_ids)
        encoder, device = self.student.encoder, global_crops.device
        mask = masks.mask if encoder.backbone.has_mask_token else None
        keys = self.drop_path_keys(step, sample_ids, range(views.global_), device)
        if not views.local:
            features = encoder(global_crops, mask, attention=False, drop_key=keys)
            return StudentOutput(features.patches, features.grid, features.pooled)
        local_keys = self.drop_path_keys(step, sample_ids, range(views.global_, views.global_ + views.local), device)
        if encoder.supports_packing(global_crops):
            features, local = encoder.forward_packed([(global_crops, mask, keys), (local_crops, None, local_keys)])
        else:
            features = encoder(global_crops, mask, attention=False, drop_key=keys)
            local = encoder(local_crops, attention=False, drop_key=local_keys)
        return StudentOutput(features.patches, features.grid, torch.cat([features.pooled, local.pooled]))

    def drop_path_keys(self, step: int, sample_ids: Tensor, views: range, device) -> Tensor:
        """Return the keys of stochastic depth, int64 [len(views) * B]."""
        view = torch.arange(views.start, views.stop).repeat_interleave(len(sample_ids))
        samples = sample_ids.cpu().repeat(len(views))
        keys = keyed_random.make_key(keyed_random.DROP_PATH, self.seed, step, samples, view)
        return keys.to(device, non_blocking=True)

    def teacher_probs(self, teacher: TeacherOutput, weight: Tensor, samples: int, epoch: int) -> TeacherProbs:
        """Return the targets of whole crops, [G, B, K], for the teacher's last layer weight [K, d]."""
        if teacher.probs is not None:
            return WholeProbs(teacher.probs.unflatten(0, (-1, samples)))
        logits = LinearLogits(teacher.bottleneck.unflatten(0, (-1, samples)), weight)
        return CenteredProbs(logits.cast(), self.center, self.cls_temperature(epoch))

    @torch.no_grad()
    def result(
        self, loss: Tensor, cls_loss: Tensor, patch_loss: Tensor, teacher: TeacherOutput, **more: Tensor
    ) -> dict[str, Tensor]:
        """Return `loss` with its graph, and the rest as detached 0-dim tensors, without a host sync.

        mask_share is the share of masked patches; center_shift the distance of this step's mean logits from the
        centers, 0 without centers.
        """
        masks = teacher.masks
        dtype, device = cls_loss.dtype, cls_loss.device
        return {
            "loss": loss,
            "cls": cls_loss.detach(),
            "patch": patch_loss.detach(),
            **{name: value.detach() for name, value in more.items()},
            "mask_share": torch.full((), masks.num_masked / masks.mask.numel(), dtype=dtype, device=device),
            "center_shift": self.centers.shift().to(dtype),
        }

    def collapse_statistics(
        self, student_logits: LinearLogits, teacher_probs: TeacherProbs, teacher: TeacherOutput
    ) -> dict[str, Tensor]:
        """Return the collapse statistics of this rank's batch, see functional/collapse.py."""
        agreement = collapse.mask_agreement(teacher.masks.mask)
        return {
            **collapse.view_statistics(student_logits, teacher_probs),
            **collapse.feature_statistics(teacher.pooled),
            "mask_agreement": agreement.to(at_least_float32(teacher.pooled).dtype),
        }

    @torch.no_grad()
    def update_teacher(self, momentum: float, ok: Tensor | None = None) -> None:
        """Move centers and teacher after a step, teacher <- momentum teacher + (1 - momentum) student.

        Where the 0-dim bool `ok` is False nothing changes, without a host sync.
        """
        self.centers.update(ok)
        ema.ema_(dict(self.teacher.named_parameters()), dict(self.student.named_parameters()), momentum, ok)


def check_masking(masking: Masking, encoder: nn.Module) -> None:
    """Raise UserError if the pooling has no attention for the masking, or the backbone no mask token."""
    name = masking_name(masking)
    if masking.needs_attention and not encoder.pooling.gives_attention:
        raise UserError(
            f"masking {name} follows the teacher's attention, and pooling {pooling_name(encoder.pooling)} has none: "
            f"choose a pooling with attention ({with_attention()}), or masking random or block"
        )
    if not isinstance(masking, NoMasking) and not encoder.backbone.has_mask_token:
        raise UserError(
            f"masking {name} masks patches, and the backbone has no mask token: build it with mask_token=True"
        )


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor: the sum over ranks of a single process."""
    return tensor

"""Distillation: the student learns the features of a frozen teacher, pooled and of patches."""

from __future__ import annotations

import copy
import hashlib
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count, NonNegative
from maskwise.errors import UserError
from maskwise.functional import distillation, ema, keyed_random
from maskwise.functional.attention import patch_attention
from maskwise.methods.base import EncoderWithHead, Method
from maskwise.methods.masking import Masking, NoMasking, SampledMasks, masking_name
from maskwise.nn.encoder import Encoder

PROJECTIONS = 2  # encoder and head take the seed and the one after it


class Projections(nn.Module):
    """Linear maps of the student's pooled vectors and patches to the width of the teacher's; no export has them."""

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        self.pooled = nn.Linear(student_dim, teacher_dim)
        self.patches = nn.Linear(student_dim, teacher_dim)


class Distill(Method):
    """Distillation of a frozen encoder, the source, into a student of any size, without labels.

    The loss is the mean cosine distance of the student's pooled vectors from the source's, weighted by `pooled_weight`,
    plus that of its patches from the source's, resampled bilinearly to its grid, weighted by `patch_weight`; student
    features pass linear maps. Global crops are compared with the same crop, local crops with each global crop. With a
    masking the student sees masked crops and the source whole ones, whose attention the masks may follow; `patches` is
    "all", or "masked" for masked patches alone (iBOT; MaskDistill). `model` names the source, `teacher_size` is the
    side to which its crops are resized. With `average`, `teacher` is the moving average of the student (DINOv2, sec.
    5), else the student itself; it is evaluated and exported. The source is in no state dict, only its digest is.
    Raises UserError where source, student, crops and masking do not fit.
    """

    needs_momentum = False

    def __init__(
        self,
        encoder: Encoder,
        source: Encoder,
        masking: Masking | None = None,
        *,
        model: str,
        teacher_size: Optional[Count] = None,
        pooled_weight: NonNegative = 1.0,
        patch_weight: NonNegative = 1.0,
        patches: Literal["all", "masked"] = "all",
        average: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.masking = NoMasking() if masking is None else masking
        check_source(source, model, encoder, self.masking, patches)
        self.student = EncoderWithHead(encoder, nn.Identity())
        self.teacher = self.student
        if average:
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.teacher.encoder.backbone.freeze_as_teacher_()
        with keyed_random.seed_scope(seed + PROJECTIONS):
            self.projections = Projections(encoder.dim, source.dim)
        self.model, self.teacher_size = model, teacher_size
        self.pooled_weight, self.patch_weight, self.patches = pooled_weight, patch_weight, patches
        self.seed = seed
        # past nn.Module's registration: neither trained, nor set to train mode, nor saved
        object.__setattr__(self, "source", source.eval().requires_grad_(False))
        self.register_buffer("source_digest", digest_of(source))

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of one batch, "loss" with its graph; changes no buffer but batch norms' statistics.

        global_crops [G * B, 3, S, S] and local_crops [L * B, 3, s, s], normalized floats, crop-major; sample_ids
        int64 [B], preferably on the CPU.
        """
        # 1. The source sees the whole global crops; its attention may choose the masks.
        encoder, samples = self.student.encoder, len(sample_ids)
        views = len(global_crops) // samples
        grid = encoder.backbone.grid_for(tuple(global_crops.shape[-2:]))
        targets = self.source_features(global_crops)
        masks = self.sample_masks(targets, grid, step, sample_ids, views)

        # 2. The student sees the masked global crops and all local crops.
        mask = masks.mask if encoder.backbone.has_mask_token else None
        keys = self.drop_path_keys(step, sample_ids, range(views), global_crops.device)
        features = encoder(global_crops, mask, attention=False, drop_key=keys)
        pooled = self.projections.pooled(features.pooled).unflatten(0, (views, samples))
        target = targets.pooled.unflatten(0, (views, samples))
        distances = [distillation.cosine_distance(pooled, target).flatten()]
        if local_crops is not None and len(local_crops):
            locals_ = range(views, views + len(local_crops) // samples)
            keys = self.drop_path_keys(step, sample_ids, locals_, global_crops.device)
            local = encoder(local_crops, attention=False, drop_key=keys, patches=False).pooled
            local = self.projections.pooled(local).unflatten(0, (-1, 1, samples))
            distances.append(distillation.cosine_distance(local, target[None]).flatten())

        # 3. Cosine distances of pooled vectors, and of patches on the student's grid.
        pooled_loss = torch.cat(distances).mean()
        patches = distillation.resample_tokens(targets.patches, targets.grid, grid)
        patch_distances = distillation.cosine_distance(self.projections.patches(features.patches), patches)
        masked = self.patches == "masked"
        patch_loss = distillation.masked_mean(patch_distances, masks.mask) if masked else patch_distances.mean()
        loss = self.pooled_weight * pooled_loss + self.patch_weight * patch_loss
        share = masks.num_masked / masks.mask.numel()
        return {
            "loss": loss,
            "pooled": pooled_loss.detach(),
            "patch": patch_loss.detach(),
            "mask_share": torch.full((), share, dtype=loss.dtype, device=loss.device),
        }

    @torch.no_grad()
    def source_features(self, global_crops: Tensor):
        """Return the source's features of whole crops in its own normalization and size."""
        student, source = self.student.encoder, self.source
        images = distillation.renormalize(global_crops, (student.mean, student.std), (source.mean, source.std))
        if self.teacher_size is not None and images.shape[-2:] != (self.teacher_size,) * 2:
            side = (self.teacher_size,) * 2
            images = F.interpolate(images, size=side, mode="bilinear", antialias=True, align_corners=False)
        return source(images, attention=self.masking.needs_attention)

    def sample_masks(self, targets, grid: tuple[int, int], step: int, sample_ids: Tensor, views: int) -> SampledMasks:
        """Return masks of the student's global crops; the source's attention is resampled to the student's grid."""
        attention = targets.attention
        if attention is not None:
            if self.source.pooling.k > 1:
                attention = patch_attention(attention, self.source.pooling.k)[:, None]
            attention = distillation.resample_tokens(attention.transpose(1, 2), targets.grid, grid).transpose(1, 2)
        device = targets.pooled.device
        return self.masking.sample(attention, grid, step=step, sample_ids=sample_ids, device=device, views=views)

    def drop_path_keys(self, step: int, sample_ids: Tensor, views: range, device) -> Tensor:
        """Return the keys of stochastic depth, int64 [len(views) * B]."""
        view = torch.arange(views.start, views.stop).repeat_interleave(len(sample_ids))
        samples = sample_ids.cpu().repeat(len(views))
        keys = keyed_random.make_key(keyed_random.DROP_PATH, self.seed, step, samples, view)
        return keys.to(device, non_blocking=True)

    @torch.no_grad()
    def update_teacher(self, momentum: float, ok: Tensor | None = None) -> None:
        """Move the average of weights and running statistics where the 0-dim bool `ok` holds, without a host sync."""
        if self.teacher is not self.student:
            ema.average_(self.teacher, self.student, momentum, ok)

    def load_state_dict(self, state_dict, *arguments, **options):
        """Load a checkpoint; raises UserError if it was trained with another source."""
        digest = state_dict.get("source_digest")
        if digest is not None and not torch.equal(digest.cpu(), self.source_digest.cpu()):
            raise UserError(
                f"method.model {self.model} has other weights than when this run began: bring the old ones back, or "
                "give another --out"
            )
        return super().load_state_dict(state_dict, *arguments, **options)

    def _apply(self, function, *arguments, **options):
        """Move the source with the method."""
        self.source._apply(function)
        return super()._apply(function, *arguments, **options)


def digest_of(network: nn.Module) -> Tensor:
    """Return the SHA-256 of names, shapes and values of a network's tensors, uint8 [32]."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        values = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).clone()


def check_source(source: Encoder, model: str, encoder: Encoder, masking: Masking, patches: str) -> None:
    """Raise UserError if source, student and masking do not fit."""
    if len(source.mean) != len(encoder.mean):
        raise UserError(
            f"method.model {model} takes {len(source.mean)} channels and the student {len(encoder.mean)}: "
            "choose a teacher of as many channels"
        )
    name = masking_name(masking)
    if masking.needs_attention and not source.pooling.gives_attention:
        raise UserError(
            f"masking {name} follows the attention of method.model {model}, which gives none: choose masking random "
            "or block, or a teacher with attention"
        )
    is_masked = not isinstance(masking, NoMasking)
    if is_masked and not encoder.backbone.has_mask_token:
        raise UserError(
            f"masking {name} masks patches, and the backbone has no mask token: build it with mask_token=True"
        )
    if patches not in ("all", "masked"):
        raise UserError(f"method.patches={patches!r} is unknown: choose all or masked")
    if patches == "masked" and not is_masked:
        raise UserError("method.patches=masked compares masked patches, and masking is none: choose a masking, or all")

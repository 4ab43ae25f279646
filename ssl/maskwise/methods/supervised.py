"""Supervised training of an encoder with a classifier; the teacher is their moving average, or the student itself."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.bounds import NonNegative, Probability, Rate
from maskwise.errors import UserError
from maskwise.functional import ema, keyed_random
from maskwise.functional.classification import criterion
from maskwise.methods.base import EncoderWithHead, Method
from maskwise.nn.backbones.transformer import set_token_dropout_

DROPOUT = 50  # stream of keyed_random


class Supervised(Method):
    """An encoder with a classifier, trained on soft targets.

    `loss` is softmax, or bce with targets above `bce_threshold` set to 1. With `splits` views of each image, the loss
    is that of the first plus jsd_weight times the divergence of the predictions (AugMix, sec. 3), or with weight 0 the
    mean over views; `split_norm` gives each further view its own batch norms in training. `dropout` is that of a Vision
    Transformer, seeded by (seed, step, first sample of the micro-batch). With `average` the teacher is the moving
    average of weights and statistics, else the student itself.
    """

    learns_labels = True
    no_weight_decay_names = ("pos_embed", "cls_token", "reg_token")

    def __init__(
        self,
        encoder: nn.Module,
        classifier: nn.Module,
        *,
        loss: Literal["softmax", "bce"] = "softmax",
        bce_threshold: Probability | None = None,
        splits: int = 1,
        jsd_weight: NonNegative = 0.0,
        split_norm: bool = False,
        dropout: Rate = 0.0,
        average: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if jsd_weight and splits < 2:
            raise UserError(
                f"method.jsd_weight={jsd_weight} compares views of an image, and there is only one: "
                "set augment.splits=3, or method.jsd_weight=0"
            )
        if split_norm and splits < 2:
            raise UserError(
                "method.split_norm gives each additional view its own batch norms, and there is only one view: "
                "set augment.splits=3, or method.split_norm=false"
            )
        if dropout:
            set_token_dropout_(encoder.backbone, dropout)
        self.student = EncoderWithHead(encoder, classifier)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False) if average else self.student
        self.criterion = criterion(loss, splits=splits, jsd_weight=jsd_weight, threshold=bce_threshold)
        self.views, self.seed = splits, seed
        norms = (
            [(name, part) for name, part in encoder.named_modules() if isinstance(part, _BatchNorm)]
            if split_norm
            else []
        )
        if split_norm and not norms:
            raise UserError("method.split_norm: this encoder has no batch norms; leave split_norm out")
        self.norm_names = [name for name, _ in norms]
        self.further_norms = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(part) for _, part in norms) for _ in range(splits - 1 if split_norm else 0)
        )
        self.dropout = dropout

    def forward(
        self, images: Tensor, targets: Tensor, *, step: int, epoch: int, sample_ids: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of the classifier, "loss" among them.

        images [splits * B, 3, S, S], normalized floats, view-major; soft targets [B, C]; sample_ids int64 [B].
        """
        samples, views = len(sample_ids), len(images) // len(sample_ids)
        view = torch.arange(views).repeat_interleave(samples)
        keys = keyed_random.make_key(keyed_random.DROP_PATH, self.seed, step, sample_ids.cpu().repeat(views), view)
        keys = keys.to(images.device, non_blocking=True)
        dropout_seed = contextlib.nullcontext()
        if self.dropout:
            key = keyed_random.make_key(DROPOUT, self.seed, step, int(sample_ids[0]))
            dropout_seed = keyed_random.seed_scope(int(key))
        with dropout_seed:
            return self.student.head.losses(self.student_features(images, keys), targets, self.criterion, drop_key=keys)

    def student_features(self, images: Tensor, keys: Tensor):
        """Return the student's features of all views, for drop path keys int64 [splits * B]."""
        encoder, options = self.student.encoder, {"attention": False, "layers": self.student.head.layers}
        if not self.further_norms:
            return encoder(images, drop_key=keys, **options)
        parts = []
        for view, (rows, key) in enumerate(zip(images.chunk(self.views), keys.chunk(self.views))):
            own = {} if view == 0 else self.norms_of(view)
            parts.append(functional_call(encoder, own, (rows,), {"drop_key": key, **options}))
        return joined(parts)

    def norms_of(self, view: int) -> dict[str, Tensor]:
        """Return weights and statistics of an additional view's batch norms, by their names in the encoder."""
        pairs = zip(self.norm_names, self.further_norms[view - 1])
        return {
            f"{name}.{key}": value
            for name, norm in pairs
            for key, value in (*norm.named_parameters(), *norm.named_buffers())
        }

    @torch.no_grad()
    def update_teacher(self, momentum: float, ok: Tensor | None = None) -> None:
        """Move the average of weights and running statistics where the 0-dim bool `ok` holds, without a host sync."""
        if self.teacher is not self.student:
            ema.average_(self.teacher, self.student, momentum, ok)


def joined(parts: list):
    """Concatenate the features of several views of a batch."""

    def concatenate(values: list):
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat(values)
        if isinstance(first, tuple) and first and isinstance(first[0], Tensor):
            return tuple(map(torch.cat, zip(*values)))
        return first

    names = [field.name for field in dataclasses.fields(parts[0])]
    return dataclasses.replace(parts[0], **{name: concatenate([getattr(p, name) for p in parts]) for name in names})

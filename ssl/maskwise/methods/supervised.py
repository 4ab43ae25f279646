"""Supervised training: an encoder and a classifier learn labels; the teacher is their moving average, or they themselves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.functional import average, draws
from maskwise.functional.classification import criterion
from maskwise.functional.errors import UserError
from maskwise.methods.student_teacher import Network
from maskwise.nn.dropout import drop_tokens_

DROPOUT = 50  # stream of keyed draws, beside those of functional.draws


class Supervised(nn.Module):
    """An encoder with a classifier on top, trained on soft targets (pooling.md 5.2).

    `loss` is softmax or bce (whose targets above `bce_threshold` become 1); with `splits` views of each image the first is learnt from and
    jsd_weight times the divergence of the predictions added (0: all are learnt from alike), and `split_norm` gives each further view
    batch norms of its own, which only training has. `dropout` is a Vision Transformer's. With `average` the teacher is the moving average of weights and statistics, else
    it is the student. That dropout is torch's, seeded by (seed, step, first sample of the part).
    """

    learns_labels = True
    undecayed = ("pos_embed", "cls_token", "reg_token")

    def __init__(
        self, encoder: nn.Module, classifier: nn.Module, *, loss: str = "softmax", bce_threshold: float | None = None, splits: int = 1,
        jsd_weight: float = 0.0, split_norm: bool = False, dropout: float = 0.0, average: bool = False, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if jsd_weight and splits < 2:
            raise UserError(f"method.jsd_weight={jsd_weight} compares views of an image and there is one: give augment.splits=3, or jsd_weight 0")
        if split_norm and splits < 2:
            raise UserError("method.split_norm gives every further view its own batch norms and there is one view: give augment.splits=3, or false")
        if dropout:
            drop_tokens_(encoder.backbone, dropout)
        self.student = Network(encoder, classifier)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False) if average else self.student
        self.criterion = criterion(loss, splits=splits, jsd_weight=jsd_weight, threshold=bce_threshold)
        self.views, self.seed = splits, seed
        norms = [(name, part) for name, part in encoder.named_modules() if isinstance(part, _BatchNorm)] if split_norm else []
        if split_norm and not norms:
            raise UserError("method.split_norm: this encoder has no batch norm; leave it out")
        self.norm_names = [name for name, _ in norms]
        self.further_norms = nn.ModuleList(nn.ModuleList(copy.deepcopy(part) for _, part in norms) for _ in range(splits - 1 if split_norm else 0))
        self.dropout = dropout

    def forward(self, images: Tensor, targets: Tensor, *, step: int, epoch: int, sample_ids: Tensor) -> dict[str, Tensor]:
        """Images [splits * B, 3, S, S], normalised floats, view-major, and soft targets [B, C] -> the classifier's losses, "loss" among them."""
        samples, views = len(sample_ids), len(images) // len(sample_ids)
        view = torch.arange(views).repeat_interleave(samples)
        keys = draws.mix(draws.DROP_PATH, self.seed, step, sample_ids.cpu().repeat(views), view).to(images.device, non_blocking=True)
        noise = draws.seeded(int(draws.mix(DROPOUT, self.seed, step, int(sample_ids[0])))) if self.dropout else contextlib.nullcontext()
        with noise:
            return self.student.head.losses(self.look(images, keys), targets, self.criterion, drop_key=keys)

    def look(self, images: Tensor, keys: Tensor):
        """The student's features of all views."""
        encoder, options = self.student.encoder, {"attention": False, "layers": self.student.head.layers}
        if not self.further_norms:
            return encoder(images, drop_key=keys, **options)
        parts = []
        for view, (rows, key) in enumerate(zip(images.chunk(self.views), keys.chunk(self.views))):
            own = {} if view == 0 else self.norms_of(view)
            parts.append(functional_call(encoder, own, (rows,), {"drop_key": key, **options}))
        return joined(parts)

    def norms_of(self, view: int) -> dict[str, Tensor]:
        """The weights and statistics of a further view's batch norms, by their names in the encoder."""
        pairs = zip(self.norm_names, self.further_norms[view - 1])
        return {f"{name}.{key}": value for name, norm in pairs for key, value in (*norm.named_parameters(), *norm.named_buffers())}

    @torch.no_grad()
    def update_teacher(self, momentum: float, ok: Tensor | None = None) -> None:
        """Move the average, weights and running statistics alike; where the 0-dim bool `ok` is False nothing changes, and the host never reads it."""
        if self.teacher is self.student:
            return
        kinds = [{**dict(network.named_parameters()), **dict(network.named_buffers())} for network in (self.teacher, self.student)]
        moved, counts = ([{name: value for name, value in kind.items() if value.is_floating_point() == floats} for kind in kinds] for floats in (True, False))
        average.ema_(*moved, momentum, ok)
        for name, value in counts[0].items():
            value.copy_(counts[1][name] if ok is None else torch.where(ok, counts[1][name], value))


def joined(parts: list):
    """Features of several parts of a batch as those of the whole."""

    def together(values):
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], tuple) and values[0] and isinstance(values[0][0], Tensor):
            return tuple(map(torch.cat, zip(*values)))
        return values[0]

    return dataclasses.replace(parts[0], **{each.name: together([getattr(part, each.name) for part in parts]) for each in dataclasses.fields(parts[0])})

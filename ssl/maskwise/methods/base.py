"""Base class of all training methods, with what they declare to trainer, builders and exports."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Method(nn.Module, ABC):
    """A student and a teacher network, and the losses of a batch.

    `forward(crops, local_crops, *, step, epoch, sample_ids)` returns {"loss": scalar, ...}; a method that learns labels
    takes (images, targets) in their place. `student` and `teacher` are `EncoderWithHead`, perhaps the same one.
    """

    views = 2  # rows of the first input per sample
    learns_labels = False  # takes (images, targets) instead of crops
    has_patch_loss = False  # has a loss on masked patches: patch temperatures, patch prototypes
    shares_targets = False  # has `teacher_forward` and `share_targets`; `forward` takes `teacher`
    has_statistics = False  # `forward` takes `statistics` and then returns collapse statistics too
    needs_momentum = True  # its teacher is the moving average of the student
    no_weight_decay_names: tuple[str, ...] = ()  # last parts of names of parameters without weight decay

    student: nn.Module
    teacher: nn.Module

    @abstractmethod
    def forward(self, *inputs, **options) -> dict[str, Tensor]:
        """Return the losses of one batch, "loss" with its graph."""

    @abstractmethod
    @torch.no_grad()
    def update_teacher(self, momentum: float, ok: Tensor | None = None) -> None:
        """Move the teacher after a step; where the 0-dim bool `ok` is False nothing changes, without a host sync."""


class EncoderWithHead(nn.Module):
    """An encoder and the head on top of it."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head

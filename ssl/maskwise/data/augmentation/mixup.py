"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighboring images of a batch and their labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.functional.classification import smooth_labels

STREAM = 46  # distinct from the streams of functional.keyed_random


class MixupCutMix:
    """Mix rows 2i and 2i + 1 of a batch with timm's arithmetic; one keyed draw per batch.

    mixup, cutmix: concentrations of their Beta distributions (0: off; with both, CutMix has probability `switch`);
    prob: of mixing at all; smoothing: of the labels over `classes`. Pairs are neighbors, so that every split of a batch
    into ranks or micro-batches of even size mixes the same images.
    """

    def __init__(
        self,
        classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch: float = 0.5,
        smoothing: float = 0.0,
    ):
        self.classes, self.smoothing = classes, smoothing
        self.mixup, self.cutmix = mixup, cutmix
        self.prob, self.switch = prob, switch

    @property
    def mixes(self) -> bool:
        """Return whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Mix floats [B, C, H, W] (overwritten) and labels int64 [B] -> images and soft targets float32 [B, classes].

        Raises UserError for an odd B.
        """
        targets = smooth_labels(labels, self.classes, self.smoothing)
        if not self.mixes:
            return images, targets
        if len(images) % 2:
            raise UserError(
                f"{len(images)} images cannot be mixed in pairs: "
                "choose train.batch_size and train.accumulate so that each part of a batch is even"
            )
        share, box = self.sample(key, images.shape[-2:])
        if share == 1:
            return images, targets
        if box is None:
            pairs = images.unflatten(0, (-1, 2))
            images = torch.lerp(pairs.flip(1), pairs, share).flatten(0, 1)
        else:
            inside = (..., slice(box[0], box[1]), slice(box[2], box[3]))
            images[inside] = images[inside].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        pairs = targets.unflatten(0, (-1, 2))
        return images, (share * pairs + (1 - share) * pairs.flip(1)).flatten(0, 1)

    def sample(self, key: int, size: tuple[int, int]) -> tuple[float, tuple[int, int, int, int] | None]:
        """Sample each image's share of its own mixture, and CutMix's box (top, bottom, left, right) or None."""
        with keyed_random.seed_scope(key):
            if np.random.rand() >= self.prob:
                return 1.0, None
            both = self.mixup > 0 and self.cutmix > 0
            use_cutmix = np.random.rand() < self.switch if both else self.cutmix > 0
            concentration = self.cutmix if use_cutmix else self.mixup
            share = float(np.random.beta(concentration, concentration))
            if not use_cutmix:
                return share, None
            ratio = np.sqrt(1 - share)
            bounds = []
            for side in size:
                reach, middle = int(side * ratio), np.random.randint(0, side)
                bounds += [int(np.clip(middle - reach // 2, 0, side)), int(np.clip(middle + (reach + 1) // 2, 0, side))]
        top, bottom, left, right = bounds
        return 1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right)

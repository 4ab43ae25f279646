"""Mixup and CutMix: two neighbours of a batch become two mixtures of both, images and labels alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskwise.functional import draws
from maskwise.functional.classification import smoothed
from maskwise.functional.errors import UserError

STREAM = 46  # beside the streams of functional.draws


class Mixing:
    """Batches whose rows 2i and 2i + 1 are mixed, with timm's arithmetic and one draw for the whole batch, keyed by what the caller says.

    mixup, cutmix: the concentrations of their Beta distributions (0: off; with both CutMix is taken with probability `switch`); prob of
    mixing at all; smoothing of the labels over `classes`. Because pairs are neighbours, any split of a batch into ranks or
    micro-batches of even size mixes the same ones. Zhang et al. 2018; Yun et al. 2019.
    """

    def __init__(self, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, prob: float = 1.0, switch: float = 0.5, smoothing: float = 0.0):
        self.classes, self.mixup, self.cutmix, self.prob, self.switch, self.smoothing = classes, mixup, cutmix, prob, switch, smoothing

    @property
    def mixes(self) -> bool:
        """Whether there is anything to mix."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Floats [B, C, H, W] (written to), int64 [B] -> mixed images and soft targets float32 [B, classes]; raises UserError for an odd B."""
        targets = smoothed(labels, self.classes, self.smoothing)
        if not self.mixes:
            return images, targets
        if len(images) % 2:
            raise UserError(f"{len(images)} images cannot be mixed in pairs: choose train.batch_size and train.accumulate so that each part of a batch is even")
        share, box = self.draw(key, images.shape[-2:])
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

    def draw(self, key: int, size: tuple[int, int]) -> tuple[float, tuple[int, int, int, int] | None]:
        """The share of each image in its own mixture, and CutMix's box (top, bottom, left, right) or None, for images of that size."""
        with draws.seeded(key):
            if np.random.rand() >= self.prob:
                return 1.0, None
            cut = np.random.rand() < self.switch if self.mixup > 0 and self.cutmix > 0 else self.cutmix > 0
            concentration = self.cutmix if cut else self.mixup
            share = float(np.random.beta(concentration, concentration))
            if not cut:
                return share, None
            ratio = np.sqrt(1 - share)
            bounds = []
            for side in size:
                reach, middle = int(side * ratio), np.random.randint(0, side)
                bounds += [int(np.clip(middle - reach // 2, 0, side)), int(np.clip(middle + (reach + 1) // 2, 0, side))]
        top, bottom, left, right = bounds
        return 1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right)

"""What a probe trains on: features of shuffled training images, batch by batch, frozen or made anew from crops each epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from maskwise.data.crop_and_flip import CropAndFlip
from maskwise.evaluation import features
from maskwise.functional import draws

WINDOW = 8192  # images whose fresh features are held at a time


class ProbeBatches:
    """Batches (features float32 [b, F], labels int64 [b]) of an epoch, in an order that (seed, epoch) gives; the last may be short.

    augment: crops and flips of the encoder's image size, drawn anew each epoch, their features computed as they are needed, a window
    at a time; ranks share that work and all get every batch, so that heads trained on them are equal on all ranks. Otherwise the
    features of the evaluation transform, computed once (and kept in `cache`, if given). feature_batch: images in a pass of the
    encoder. `seconds` and `images` tell what features took; `hash`, `corrupt` as in features.FeatureBank.
    """

    def __init__(
        self, encoder, dataset, feature: str, *, batch_size: int, augment: bool, seed: int = 0, world=None, feature_batch: int = 256,
        precision: str = "fp32", cache=None,
    ):  # fmt: skip
        self.encoder, self.dataset, self.feature, self.world = encoder, dataset, feature, world
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.options = {"batch_size": feature_batch, "precision": precision}
        self.labels = torch.as_tensor(dataset.labels)
        self.seconds, self.images, self.corrupt, self.origin = 0.0, 0, {}, "computed anew each epoch"
        if augment:
            features.check(encoder, (feature,), precision)
            self.hash, self.rows = features.fingerprint(dataset), torch.arange(len(dataset))
        else:
            self.bank = features.extract(encoder, dataset, feature, world=world, cache=cache, **self.options)
            self.hash, self.corrupt, self.rows = self.bank.hash, self.bank.corrupt, self.bank.index
            self.seconds, self.images, self.origin = self.bank.seconds, len(self.bank), self.bank.origin[feature]

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, on the CPU."""
        order = draws.order(self.seed, epoch, len(self.rows))
        if not self.augment:
            for chosen in order.split(self.batch_size):
                yield self.bank[self.feature][chosen].float(), self.bank.labels[chosen]
            return
        size = getattr(self.encoder, "image_size", None) or self.encoder.transform.size
        view = CropAndFlip(size, seed=self.seed, epoch=epoch)
        for window in order.split(max(1, WINDOW // self.batch_size) * self.batch_size):
            begin = time.perf_counter()
            found, index, corrupt = features.extract_rows(self.encoder, self.dataset, (self.feature,), window, world=self.world, view=view, **self.options)
            self.corrupt |= corrupt
            self.seconds, self.images = self.seconds + time.perf_counter() - begin, self.images + len(index)
            for x, y in zip(found[self.feature].split(self.batch_size), self.labels[index].split(self.batch_size)):
                yield x.float(), y

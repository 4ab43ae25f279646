"""Feature batches for training a probe: cached, or computed from new crops in each epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from maskwise.data.augmentation.probe_crop import CropAndFlip
from maskwise.evaluation.features import extract, feature_names
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.functional import keyed_random

WINDOW = 8192  # images whose fresh features are held at a time


class ProbeBatches:
    """Batches (features float32 [b, F], labels int64 [b]) of an epoch, in an order given by (seed, epoch).

    The last batch may be short. augment: new crops and flips at the encoder's image size in each epoch, whose features
    are computed a window at a time; ranks share that work and all get every batch, so that heads are equal on all
    ranks. Otherwise features of the evaluation transform, computed once (and stored in `cache`, if given).
    feature_batch: images in a pass of the encoder. `seconds` and `images`: cost of the features; `hash`, `corrupt` as
    in FeatureBank.
    """

    def __init__(
        self,
        encoder,
        dataset,
        feature: str,
        *,
        batch_size: int,
        augment: bool,
        seed: int = 0,
        world=None,
        feature_batch: int = 256,
        precision: str = "fp32",
        cache=None,
    ):
        self.encoder, self.dataset, self.feature, self.world = encoder, dataset, feature, world
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.options = {"batch_size": feature_batch, "precision": precision}
        self.labels = torch.as_tensor(dataset.labels)
        self.seconds, self.images, self.corrupt, self.origin = 0.0, 0, {}, "computed again each epoch"
        if augment:
            feature_names.check(encoder, (feature,), precision)
            self.hash, self.rows = fingerprint(dataset), torch.arange(len(dataset))
        else:
            self.bank = extract.extract(encoder, dataset, feature, world=world, cache=cache, **self.options)
            self.hash, self.corrupt, self.rows = self.bank.hash, self.bank.corrupt, self.bank.index
            self.seconds, self.images, self.origin = self.bank.seconds, len(self.bank), self.bank.origin[feature]

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch, on the CPU."""
        order = keyed_random.order(self.seed, epoch, len(self.rows))
        if not self.augment:
            for chosen in order.split(self.batch_size):
                yield self.bank[self.feature][chosen].float(), self.bank.labels[chosen]
            return
        size = getattr(self.encoder, "image_size", None) or self.encoder.transform.size
        view, read = CropAndFlip(size, seed=self.seed, epoch=epoch), 0
        for window in order.split(max(1, WINDOW // self.batch_size) * self.batch_size):
            begin = time.perf_counter()
            features, index, corrupt = extract.extract_rows(
                self.encoder, self.dataset, (self.feature,), window, world=self.world, view=view, **self.options
            )
            self.corrupt |= corrupt
            read += len(index)
            if not len(index):  # none of this window can be read
                continue
            self.seconds, self.images = self.seconds + time.perf_counter() - begin, self.images + len(index)
            for x, y in zip(features[self.feature].split(self.batch_size), self.labels[index].split(self.batch_size)):
                yield x.float(), y
        extract.require_images(read, self.dataset, self.corrupt)

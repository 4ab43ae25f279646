"""Training batches of fine-tuning: timm's augmentation, mixing and repeats, with keyed random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from maskwise.data.augmentation.mixup import STREAM, MixupCutMix
from maskwise.data.augmentation.timm_policies import patch_posterize
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.worker import Items
from maskwise.errors import UserError
from maskwise.functional import keyed_random

AUGMENT = 45  # stream of keyed random numbers, distinct from those of functional.keyed_random


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Augmentation of fine-tuning (timm); repeats: copies of each image in an epoch; rand_augment: policy or "none"."""

    repeats: int = 1
    rand_augment: str = "none"
    color_jitter: float = 0.4
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0


class TransferBatches:
    """This rank's (images [b, 3, H, W], soft targets [b, C], places int64 [b]) of every step of an epoch.

    An epoch is floor(N / 256) * 256 samples (N for fewer than 256 images, or without repeats), each image `repeats`
    times in a row, in an order given by (seed, epoch); whole batches only. Rows i and B - 1 - i of a batch, the pairs
    that timm mixes, are adjacent on one rank, so that they are the same for any number of ranks. An unreadable image is
    replaced by the next readable one and listed in `corrupt`. Raises UserError for a batch larger than the epoch.
    """

    def __init__(
        self,
        dataset,
        encoder,
        augmentation: Augmentation = Augmentation(),
        *,
        batch_size: int,
        classes: int,
        seed: int = 0,
        world=None,
        workers: int = 0,
    ):
        self.dataset, self.batch_size, self.repeats, self.seed = dataset, batch_size, augmentation.repeats, seed
        self.workers, self.corrupt = workers, {}
        self.labels = torch.as_tensor(dataset.labels)
        count = len(dataset)
        self.samples = count // 256 * 256 if self.repeats > 1 and count >= 256 else count
        rank, world_size = (0, 1) if world is None else (world.rank, world.size)
        if self.samples < batch_size:
            largest = self.samples // (2 * world_size) * 2 * world_size
            remedy = f"give batch_size={largest}" if largest else f"give at least {2 * world_size} images"
            raise UserError(
                f"finetune: batch_size {batch_size} is larger than an epoch of {self.samples} images; {remedy}"
            )
        half = batch_size // 2 // world_size
        low = torch.arange(rank * half, (rank + 1) * half)
        self.mine = torch.stack([low, batch_size - 1 - low], dim=1).flatten()
        self.transform = train_transform(encoder, augmentation)
        self.mix = MixupCutMix(
            classes, mixup=augmentation.mixup, cutmix=augmentation.cutmix, smoothing=augmentation.smoothing
        )

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """Return the image indices of an epoch, int64 [steps * B]."""
        order = keyed_random.order(self.seed, epoch, len(self.dataset)).repeat_interleave(self.repeats)
        return order[: len(self) * self.batch_size]

    def epoch(self, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of one epoch, on the device; places index the epoch's order."""
        order = self.order(epoch)
        places = (torch.arange(len(self))[:, None] * self.batch_size + self.mine).flatten().tolist()
        loader = torch.utils.data.DataLoader(
            FinetuneViews(self, order, epoch),
            sampler=places,
            batch_size=len(self.mine),
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),
            pin_memory=False,
            persistent_workers=False,
        )
        for step, rows in enumerate(Items(loader)):
            images = torch.stack([row[0] for row in rows])
            labels, taken = (torch.tensor([row[i] for row in rows]) for i in (1, 2))
            for row in rows:
                self.corrupt.update(row[3])
            if device.type == "cuda":
                images = images.pin_memory()
            images, labels = images.to(device, non_blocking=True), labels.to(device)
            yield *self.mix(images, labels, int(keyed_random.make_key(STREAM, self.seed, epoch, step))), taken


def train_transform(encoder, augmentation: Augmentation):
    """Return timm's training transform at the encoder's image size: Pillow image -> normalized float [3, H, W]."""
    import timm.data

    import maskwise.nn.backbones.timm_registry  # noqa: F401  prepares torchvision for timm

    policy = None if augmentation.rand_augment == "none" else augmentation.rand_augment
    try:
        transform = timm.data.create_transform(
            tuple(getattr(encoder, "image_size", None) or encoder.transform.size),
            is_training=True,
            color_jitter=augmentation.color_jitter,
            auto_augment=policy,
            interpolation="bicubic",
            re_prob=augmentation.erasing,
            re_mode="pixel",
            re_count=1,
            mean=tuple(map(float, encoder.mean)),
            std=tuple(map(float, encoder.std)),
        )
    except (AssertionError, ValueError, KeyError, AttributeError):  # of timm, for a name that it cannot parse
        raise UserError(
            f"finetune: rand_augment={policy!r} is not a timm policy: give rand-m9-mstd0.5-inc1, original, or none"
        ) from None
    transform.transforms = [patch_posterize(step) for step in transform.transforms]
    return transform


class FinetuneViews:
    """Map-style dataset of an epoch: place -> (image, label, place, {name: reason} of unreadable images)."""

    def __init__(self, batches: TransferBatches, order: Tensor, epoch: int):
        self.batches, self.order, self.epoch = batches, order, epoch

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int):
        batches, corrupt = self.batches, {}
        first = int(self.order[place])
        for further in range(len(batches.dataset)):
            index = (first + further) % len(batches.dataset)
            try:
                image = batches.dataset.image(index)
                break
            except CorruptImage as error:
                corrupt[batches.dataset.name(index)] = error.reason
        else:
            raise UserError(f"none of the {len(batches.dataset)} images can be read; give images")
        if image.dtype != torch.uint8 or len(image) != 3:
            raise UserError(
                f"finetune augments RGB images of 8 bits, and {batches.dataset.name(index)} has {len(image)} channels "
                f"of {image.dtype}; evaluate linear or attentive"
            )
        with keyed_random.seed_scope(int(keyed_random.make_key(AUGMENT, batches.seed, self.epoch, place))):
            view = batches.transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return view, int(batches.labels[index]), place, corrupt

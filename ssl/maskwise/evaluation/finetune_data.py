"""Training batches of fine-tuning: timm's augmentation, mixing and repeats, every random number keyed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from maskwise.data.decode import CorruptImage
from maskwise.data.mixing import STREAM, Mixing
from maskwise.data.policy import mended
from maskwise.functional import draws
from maskwise.functional.errors import UserError

AUGMENT = 45  # stream of keyed draws, beside those of functional.draws


class TransferBatches:
    """This rank's (images [b, 3, H, W], soft targets [b, C], places int64 [b]) of every step of an epoch.

    An epoch is floor(N / 256) * 256 samples (N for fewer than 256 images, or without repeats), each image `repeats` times in a row,
    in an order that (seed, epoch) gives; whole batches only. Rows i and B - 1 - i of a batch, the pairs that timm mixes, are
    neighbours on one rank, so that they are the same for any number of ranks. An unreadable image is replaced by the next readable one and listed in `corrupt`.
    Raises UserError for a batch larger than the epoch.
    """

    def __init__(
        self, dataset, encoder, *, batch_size: int, repeats: int = 1, rand_augment: str = "none", colour_jitter: float = 0.4, erasing: float = 0.0,
        mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0, classes: int, seed: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0,
    ):  # fmt: skip
        import maskwise.nn.backbone  # noqa: F401  it readies torchvision for timm
        import timm.data

        self.dataset, self.batch_size, self.repeats, self.seed = dataset, batch_size, repeats, seed
        self.workers, self.corrupt = workers, {}
        self.labels = torch.as_tensor(dataset.labels)
        count = len(dataset)
        self.samples = count // 256 * 256 if repeats > 1 and count >= 256 else count
        if self.samples < batch_size:
            raise UserError(f"finetune: batch_size {batch_size} is larger than an epoch of {self.samples} images; give batch_size={max(2, self.samples // 2 * 2)}")
        half = batch_size // 2 // world_size
        low = torch.arange(rank * half, (rank + 1) * half)
        self.mine = torch.stack([low, batch_size - 1 - low], dim=1).flatten()
        size = tuple(getattr(encoder, "image_size", None) or encoder.transform.size)
        self.transform = timm.data.create_transform(
            size, is_training=True, color_jitter=colour_jitter, auto_augment=None if rand_augment == "none" else rand_augment, interpolation="bicubic",
            re_prob=erasing, re_mode="pixel", re_count=1, mean=tuple(map(float, encoder.mean)), std=tuple(map(float, encoder.std)),
        )  # fmt: skip
        self.transform.transforms = [mended(each) for each in self.transform.transforms]
        self.mix = Mixing(classes, mixup=mixup, cutmix=cutmix, smoothing=smoothing)

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch -> int64 [steps * B]."""
        order = draws.order(self.seed, epoch, len(self.dataset)).repeat_interleave(self.repeats)
        return order[: len(self) * self.batch_size]

    def epoch(self, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of one epoch, on the device; places are rows of the epoch's order."""
        order = self.order(epoch)
        places = (torch.arange(len(self))[:, None] * self.batch_size + self.mine).flatten().tolist()
        loader = torch.utils.data.DataLoader(
            Views(self, order, epoch), sampler=places, batch_size=len(self.mine), num_workers=self.workers, collate_fn=list,
            generator=torch.Generator(), pin_memory=False, persistent_workers=False,
        )  # fmt: skip
        for step, rows in enumerate(loader):
            images, labels, where = torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
            for row in rows:
                self.corrupt.update(row[3])
            if device.type == "cuda":
                images = images.pin_memory()
            images, labels = images.to(device, non_blocking=True), labels.to(device)
            yield *self.mix(images, labels, int(draws.mix(STREAM, self.seed, epoch, step))), where


class Views:
    """An epoch as a map-style set: place -> (image, label, place, {name: reason} of what could not be read)."""

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
            raise UserError(f"finetune augments RGB images of 8 bits, and {batches.dataset.name(index)} has {len(image)} channels of {image.dtype}; evaluate linear or attentive")
        with draws.seeded(int(draws.mix(AUGMENT, batches.seed, self.epoch, place))):
            view = batches.transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return view, int(batches.labels[index]), place, corrupt

"""Crops by a transform of the user in place of multi-crop, with keyed randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from maskwise.data.batch import ColorParams, Params
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.imaging.resize import pair
from maskwise.imaging.tensors import to_tensor, to_uint8

GLOBAL_NUMBER = 2


class OwnCrops:
    """Crop images by `transform(image)` -> two global crops, then `local_number` local ones.

    image: as the dataset gives it. Crops: PIL images, arrays [H, W, C] or tensors [C, H, W], uint8 or floats in 0..1,
    of the sizes of the recipe; they are normalized later and not augmented further. During the call the generators of
    Python, NumPy and torch are seeded by (seed, epoch, sample), so that crops are the same for any start, rank and
    worker. Raises UserError where the transform raises, and for other crops.
    """

    def __init__(
        self,
        transform: Callable,
        *,
        seed: int = 0,
        global_size: int | tuple[int, int] = 224,
        local_size: int | tuple[int, int] = 96,
        local_number: int = 10,
        channels: int = 3,
    ):
        self.transform, self.seed, self.channels = transform, seed, channels
        self.global_size, self.local_size, self.local_number = pair(global_size), pair(local_size), local_number

    @property
    def pixels(self) -> int:
        """Count the pixels of all crops of one image."""
        return GLOBAL_NUMBER * math.prod(self.global_size) + self.local_number * math.prod(self.local_size)

    def batch(
        self, images: Iterable, samples, epoch: int, empty=torch.empty
    ) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """Crop n images (consumed one by one) as `MultiCrop.batch` does, with parameters that leave colors alone."""
        samples = torch.as_tensor(samples, dtype=torch.int64)
        count, images = len(samples), iter(images)
        global_crops, local_crops = (
            empty(number * count, *size, self.channels, dtype=torch.uint8).permute(0, 3, 1, 2)
            for number, size in ((GLOBAL_NUMBER, self.global_size), (self.local_number, self.local_size))
        )
        targets = [*global_crops.split(1), *local_crops.split(1)]
        for i, sample in enumerate(samples.tolist()):
            image = next(images)
            for target, crop in zip(targets[i::count], self.crops(image, sample, epoch)):
                target.copy_(crop)
        plain = unchanged_colors(len(global_crops)), unchanged_colors(len(local_crops))
        return global_crops, local_crops, Params(*(colors.with_plan() for colors in plain))

    def crops(self, image, sample: int, epoch: int) -> list[torch.Tensor]:
        """Return the crops of one image, uint8 [C, h, w] each."""
        key = keyed_random.make_key(keyed_random.TRANSFORM, self.seed, epoch, sample)
        try:
            with keyed_random.seed_scope(key):
                crops = self.transform(image)
        except UserError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"transform raised {type(error).__name__}: {text}") from error
        return self.checked(crops)

    def checked(self, crops: Sequence) -> list[torch.Tensor]:
        """Return the crops of a transform as uint8 tensors. Raises UserError for another number, type or size."""
        number = GLOBAL_NUMBER + self.local_number
        wanted = f"{GLOBAL_NUMBER} global crops of {text_of(self.global_size)}"
        wanted += f" and {self.local_number} local ones of {text_of(self.local_size)}" if self.local_number else ""
        keys = "crops.global_size, crops.local_size and crops.local_number set them"
        if not isinstance(crops, (list, tuple, torch.Tensor)) or len(crops) != number:
            given = f"{len(crops)} crops" if isinstance(crops, (list, tuple)) else f"a {type(crops).__name__}"
            raise UserError(f"transform returned {given}; the recipe takes {wanted} ({keys})")
        tensors = []
        for place, crop in enumerate(crops):
            try:
                tensor = to_uint8(to_tensor(crop, self.channels))
            except UserError as error:
                raise UserError(f"transform, crop {place}: {error}") from None
            size = self.global_size if place < GLOBAL_NUMBER else self.local_size
            if tensor.ndim != 3 or tuple(tensor.shape[1:]) != size:
                here = text_of(tuple(tensor.shape[-2:]))
                raise UserError(f"transform, crop {place} is {here}; the recipe takes {wanted} ({keys})")
            tensors.append(tensor)
        return tensors


def text_of(size: tuple[int, int]) -> str:
    """Return a size (h, w) as text."""
    return f"{size[0]} x {size[1]} px"


def unchanged_colors(count: int) -> ColorParams:
    """Return the color parameters of n crops that stay as they are."""
    no = torch.zeros(count, dtype=torch.bool)
    return ColorParams(
        jitter=no,
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1),
        order=torch.arange(4).repeat(count, 1),
        gray=no,
        sigma=torch.zeros(count),
        solarize=no,
    )


def title(transform: Callable | None) -> str | None:
    """Return the name of a transform, by which a continued run recognizes it; None without one."""
    return None if transform is None else getattr(transform, "__qualname__", type(transform).__qualname__)

"""Evaluation transform: images of any common kind -> normalized crops at an encoder's size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.imaging.resize import center_crop, covering, resize_image, short_side
from maskwise.imaging.tensors import to_tensor

CROP_PCT = 0.875


@dataclass(frozen=True)
class Transform:
    """Resize, crop and normalize an image -> float [C, h, w]; C is the length of `mean`.

    Images: PIL; NumPy [H, W] or [H, W, C]; tensors [H, W], [C, H, W] or a batch [B, C, H, W]. Arrays and tensors are
    uint8, uint16, or floats in 0..1. Gray is repeated for three channels, alpha dropped, color becomes luma for one
    channel. The EXIF orientation of a PIL image is applied. The short side is resized to round(S / crop_pct),
    antialiased bicubic, then the center is cropped, as in the evaluation of DINO; for an oblong size the image covers
    (h / crop_pct, w / crop_pct), as in timm. Raises UserError for anything else.
    """

    size: tuple[int, int]
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct={self.crop_pct} is not a share of the image: give a number above 0, at most 1")

    def __call__(self, image) -> Tensor:
        image = self.crop(image)
        mean, std = (torch.tensor(values, device=image.device).view(-1, 1, 1) for values in (self.mean, self.std))
        scale = 1 if image.is_floating_point() else torch.iinfo(image.dtype).max
        return (image.float() / scale - mean) / std

    def crop(self, image) -> Tensor:
        """Convert, resize and crop without normalizing -> uint8, uint16 or float, [C, h, w]."""
        image = to_tensor(image, len(self.mean))
        resized = resize_image(image, self.resized_size(tuple(image.shape[-2:])))
        if image.is_floating_point():
            resized = resized.clamp(0, 1)  # bicubic weights overshoot
        return center_crop(resized, self.size)

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (h, w) to which an image of that size is resized before the crop."""
        if self.size[0] == self.size[1]:
            return short_side(size, round(self.size[0] / self.crop_pct))
        return covering(size, tuple(math.floor(side / self.crop_pct) for side in self.size))

"""Image views that replace the evaluation transform in some protocols, called as view(image, index)."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.imaging.resize import center_crop, resize_image, short_side
from maskwise.nn.tokens import Features


@dataclasses.dataclass(frozen=True)
class ResizeCenter:
    """Resize the short side to the size and take the center; an image of that size is unchanged (IN-9)."""

    size: tuple[int, int]

    def __call__(self, image: Tensor, index: int) -> Tensor:
        return center_crop(resize_image(image, short_side(tuple(image.shape[-2:]), max(self.size))), self.size)

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """Resize the short side to size / 0.875 (256 for 224) by bilinear interpolation and take the center."""

    size: tuple[int, int]
    crop_pct: float = 0.875

    def __call__(self, image: Tensor, index: int) -> Tensor:
        height, width = short_side(tuple(image.shape[-2:]), round(max(self.size) / self.crop_pct))
        resized = [part.resize((width, height), Image.Resampling.BILINEAR) for part in pictures(image)]
        return center_crop(from_pictures(resized, image.dtype), self.size)

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Square:
    """Resize the image to a square, changing its aspect ratio (copy detection, DINO)."""

    size: int

    def __call__(self, image: Tensor, index: int) -> Tensor:
        return resize_image(image, (self.size, self.size))

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return repr(self)


class Stretched:
    """Resize the image to a square by bilinear interpolation, changing its aspect ratio (wsolevaluation).

    sizes: index -> (width, height) of the images read.
    """

    def __init__(self, size: int):
        self.size, self.sizes = size, {}

    def __call__(self, image: Tensor, index: int) -> Tensor:
        self.sizes[index] = (image.shape[-1], image.shape[-2])
        resized = [part.resize((self.size, self.size), Image.Resampling.BILINEAR) for part in pictures(image)]
        return from_pictures(resized, image.dtype)

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return f"Stretched({self.size})"


class Native:
    """Leave the image at its size, unless its longer side exceeds `long_side` pixels (None: never downscale).

    sizes: index -> (height, width) of the images read.
    """

    def __init__(self, long_side: int | None = None):
        self.long_side, self.sizes = long_side, {}

    def __call__(self, image: Tensor, index: int) -> Tensor:
        size = self.sizes[index] = tuple(image.shape[-2:])
        if self.long_side is None or max(size) <= self.long_side:
            return image
        return resize_image(image, tuple(max(1, round(side * self.long_side / max(size))) for side in size))

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return f"Native({self.long_side})"


@dataclasses.dataclass(frozen=True)
class Downscaled:
    """Downscale the longer side to at most `long_side` (Lanczos, same aspect ratio) and crop to whole patches.

    boxes: one (x0, y0, x1, y1) per image, cropped first, or None.
    """

    long_side: int
    patch: tuple[int, int]
    boxes: tuple[tuple[float, ...], ...] | None = None

    def __call__(self, image: Tensor, index: int) -> Tensor:
        parts = pictures(image)
        if self.boxes is not None:
            parts = [part.crop(tuple(self.boxes[index])) for part in parts]
        for part in parts:
            part.thumbnail((self.long_side, self.long_side), Image.Resampling.LANCZOS)
        image = from_pictures(parts, image.dtype)
        height, width = (side // patch * patch for side, patch in zip(image.shape[-2:], self.patch))
        if not height or not width:
            size = f"{image.shape[-1]}x{image.shape[-2]}"
            raise UserError(f"image {index} is {size} pixels, less than one patch; leave it out")
        return image[:, :height, :width]

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


class MaskedOut:
    """The encoder's crop with masked patches black before normalization (AttMask, masked ImageNet)."""

    def __init__(self, crop, masked: Tensor, grid: tuple[int, int]):
        """Set the crop and the masks.

        crop: uint8 [C, H, W] -> uint8 [C, S, S]; masked: bool [images of the dataset, N] over the grid (h, w).
        """
        self.crop, self.masked, self.grid = crop, masked, grid

    def __call__(self, image: Tensor, index: int) -> Tensor:
        image = self.crop(image).clone()
        mask = self.masked[index].reshape(1, 1, *self.grid).float()
        pixels = image.view(torch.int16) if image.dtype == torch.uint16 else image  # torch cannot fill uint16
        pixels.masked_fill_(F.interpolate(mask, size=tuple(image.shape[-2:]), mode="nearest")[0].bool(), 0)
        return image

    def fingerprint(self) -> str:
        """Return the settings as text for cache keys."""
        return hashlib.sha256(repr((self.crop, self.grid)).encode() + self.masked.numpy().tobytes()).hexdigest()


def pictures(image: Tensor) -> list[Image.Image]:
    """Convert uint8 or uint16 [C, H, W] to Pillow images: one of 8-bit RGB, else one for each channel."""
    if image.dtype == torch.uint8 and len(image) == 3:
        return [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))]
    bands = np.ascontiguousarray(image.numpy())
    return [Image.fromarray(band if band.dtype == np.uint8 else band.astype(np.float32)) for band in bands]


def from_pictures(parts: list[Image.Image], dtype: torch.dtype) -> Tensor:
    """Convert the images of `pictures` back to a tensor [C, H, W] of this type."""
    pixels = [np.atleast_3d(np.array(part)) for part in parts]
    joined = torch.from_numpy(np.concatenate(pixels, axis=2)).permute(2, 0, 1)
    return joined if joined.dtype == dtype else joined.round().clamp(0, torch.iinfo(dtype).max).to(dtype)


class RawPixels(nn.Module):
    """Raw normalized pixels as an encoder, a baseline: any image -> size x size -> [C * size^2]."""

    def __init__(self, size: int = 32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.image_size, self.mean, self.std = (size, size), tuple(mean), tuple(std)
        self.dim = len(self.mean) * size * size
        self.placeholder = nn.Parameter(torch.zeros(()), requires_grad=False)  # carries the device

    def transform(self, image: Tensor) -> Tensor:
        """Map uint8 or uint16 [C, H, W] to normalized float [C, size, size]."""
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return (self.uint8_crop(image).float() / torch.iinfo(image.dtype).max - mean) / std

    def uint8_crop(self, image: Tensor) -> Tensor:
        """Resize to [C, size, size] of the same type."""
        return resize_image(image, self.image_size)

    def forward(self, images: Tensor, **requests) -> Features:
        """Map normalized images [B, C, H, W] to Features of one patch, without attention."""
        flat = resize_image(images, self.image_size).flatten(1)
        return Features(flat, flat[:, None], None, (1, 1))


class Scales(nn.Module):
    """An encoder that averages its features over several scales of an image (retrieval)."""

    def __init__(self, encoder: nn.Module, scales: tuple[float, ...], patch: tuple[int, int]):
        super().__init__()
        self.encoder, self.scales, self.patch = encoder, scales, patch
        self.mean, self.std, self.dim, self.transform = encoder.mean, encoder.std, encoder.dim, encoder.transform

    def forward(self, images: Tensor, **requests) -> Features:
        """Map normalized images [B, C, H, W] to Features, of which only `pooled` is an average."""
        outputs = []
        for scale in self.scales:
            scaled = images
            if scale != 1:
                scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            height, width = (max(1, side // patch) * patch for side, patch in zip(scaled.shape[-2:], self.patch))
            if (height, width) != tuple(scaled.shape[-2:]):
                if height <= scaled.shape[-2] and width <= scaled.shape[-1]:
                    scaled = scaled[..., :height, :width]
                else:
                    scaled = F.interpolate(scaled, size=(height, width), mode="bilinear", align_corners=False)
            outputs.append(self.encoder(scaled, **requests))
        return dataclasses.replace(outputs[0], pooled=torch.stack([output.pooled for output in outputs]).mean(dim=0))


def patch_of(encoder) -> tuple[int, int]:
    """Return the patch size in pixels, (1, 1) without one."""
    return tuple(getattr(getattr(encoder, "backbone", encoder), "patch_size", (1, 1)))

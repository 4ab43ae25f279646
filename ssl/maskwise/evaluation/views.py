"""How protocols look at an image where the evaluation transform will not do: each is called as view(image, index)."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.functional.resample import resize_image, short_side
from maskwise.nn.tokens import Features


@dataclasses.dataclass(frozen=True)
class Whole:
    """The short side brought to the size, then the centre: an image of that size is not touched (evaluation.md 7)."""

    size: tuple[int, int]

    def __call__(self, image: Tensor, index: int) -> Tensor:
        return centre(resize_image(image, short_side(tuple(image.shape[-2:]), max(self.size))), self.size)

    def fingerprint(self) -> str:
        """What this view depends on."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """The short side to size / 0.875 by bilinear interpolation, then the centre: 256 and 224 (evaluation.md 9)."""

    size: tuple[int, int]
    crop_pct: float = 0.875

    def __call__(self, image: Tensor, index: int) -> Tensor:
        height, width = short_side(tuple(image.shape[-2:]), round(max(self.size) / self.crop_pct))
        return centre(unpicture(picture(image).resize((width, height), Image.Resampling.BILINEAR)), self.size)

    def fingerprint(self) -> str:
        """What this view depends on."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Square:
    """The image squeezed into a square (attmask.md 5.10)."""

    size: int

    def __call__(self, image: Tensor, index: int) -> Tensor:
        return resize_image(image, (self.size, self.size))

    def fingerprint(self) -> str:
        """What this view depends on."""
        return repr(self)


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """The longer side shrunk to at most `long_side` (Lanczos, aspect kept, never enlarged), cut to whole patches (evaluation.md 8).

    boxes: one (x0, y0, x1, y1) an image, cut out before anything else, or None.
    """

    long_side: int
    patch: tuple[int, int]
    boxes: tuple[tuple[float, ...], ...] | None = None

    def __call__(self, image: Tensor, index: int) -> Tensor:
        whole = picture(image)
        if self.boxes is not None:
            whole = whole.crop(tuple(self.boxes[index]))
        whole.thumbnail((self.long_side, self.long_side), Image.Resampling.LANCZOS)
        image = unpicture(whole)
        height, width = (side // patch * patch for side, patch in zip(image.shape[-2:], self.patch))
        if not height or not width:
            raise UserError(f"image {index} is {whole.width}x{whole.height} pixels, less than one patch; leave it out")
        return image[:, :height, :width]

    def fingerprint(self) -> str:
        """What this view depends on."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


class Covered:
    """The encoder's own crop with the patches of a mask blackened, so that normalising makes them -mean / std (attmask.md 5.7)."""

    def __init__(self, crop, hidden: Tensor, grid: tuple[int, int]):
        """crop: uint8 [3, H, W] -> uint8 [3, S, S]; hidden: bool [images of the dataset, N] over the grid (h, w)."""
        self.crop, self.hidden, self.grid = crop, hidden, grid

    def __call__(self, image: Tensor, index: int) -> Tensor:
        image = self.crop(image).clone()
        mask = self.hidden[index].reshape(1, 1, *self.grid).float()
        return image.masked_fill_(F.interpolate(mask, size=tuple(image.shape[-2:]), mode="nearest")[0].bool(), 0)

    def fingerprint(self) -> str:
        """What this view depends on."""
        return hashlib.sha256(repr((self.crop, self.grid)).encode() + self.hidden.numpy().tobytes()).hexdigest()


def centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (h, w) of an image [3, H, W]."""
    top, left = ((there - wanted) // 2 for there, wanted in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]


def picture(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] as a PIL image."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def unpicture(image: Image.Image) -> Tensor:
    """A PIL image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class RawPixels(nn.Module):
    """Raw normalised pixels in an encoder's place, the line that learning has to beat: any image -> size x size -> [3 * size^2]."""

    def __init__(self, size: int = 32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.image_size, self.mean, self.std, self.dim = (size, size), tuple(mean), tuple(std), 3 * size * size
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)  # says where to compute

    def transform(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> float [3, size, size], normalised."""
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        return (self.uncoloured(image).float() / 255 - mean) / std

    def uncoloured(self, image: Tensor) -> Tensor:
        """uint8 [3, size, size]."""
        return resize_image(image, self.image_size)

    def forward(self, images: Tensor, **asked) -> Features:
        """Normalised images [B, 3, H, W] -> Features of one patch, without attention."""
        flat = resize_image(images, self.image_size).flatten(1)
        return Features(flat, flat[:, None], None, (1, 1))


class Scales(nn.Module):
    """An encoder that averages its raw features over several sizes of an image (evaluation.md 8)."""

    def __init__(self, encoder: nn.Module, scales: tuple[float, ...], patch: tuple[int, int]):
        super().__init__()
        self.encoder, self.scales, self.patch = encoder, scales, patch
        self.mean, self.std, self.dim, self.transform = encoder.mean, encoder.std, encoder.dim, encoder.transform

    def forward(self, images: Tensor, **asked) -> Features:
        """Normalised images [B, 3, H, W] -> Features, of which only `pooled` is an average."""
        seen = []
        for scale in self.scales:
            scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            height, width = (max(1, side // patch) * patch for side, patch in zip(scaled.shape[-2:], self.patch))
            if (height, width) != tuple(scaled.shape[-2:]):
                fits = height <= scaled.shape[-2] and width <= scaled.shape[-1]
                scaled = scaled[..., :height, :width] if fits else F.interpolate(scaled, size=(height, width), mode="bilinear", align_corners=False)
            seen.append(self.encoder(scaled, **asked))
        return dataclasses.replace(seen[0], pooled=torch.stack([features.pooled for features in seen]).mean(dim=0))


def patch_of(encoder) -> tuple[int, int]:
    """The patch size that images have to be multiples of, in pixels."""
    return tuple(getattr(getattr(encoder, "backbone", None), "patch_size", (1, 1)))

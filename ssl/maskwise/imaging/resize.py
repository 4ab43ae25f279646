"""Antialiased bicubic resizing and center crops of images, as in torchvision's evaluation transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8, uint16 or float [C, H, W] or [B, C, H, W] to size (h, w); type and layout stay."""
    size = tuple(size)
    if tuple(image.shape[-2:]) == size:
        return image
    batch = image if image.ndim == 4 else image[None]
    dtype = batch.dtype
    if dtype == torch.uint16 or dtype == torch.uint8 and batch.device.type != "cpu":  # torch resizes neither
        resized = F.interpolate(batch.float(), size=size, mode="bicubic", antialias=True)
        batch = resized.round_().clamp_(0, torch.iinfo(dtype).max).to(dtype)
    else:
        if dtype == torch.uint8 and is_vertical_first(tuple(batch.shape[-2:]), size):
            batch = F.interpolate(batch, size=(size[0], batch.shape[-1]), mode="bicubic", antialias=True)
        batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True)
    return batch if image.ndim == 4 else batch[0]


def resize_bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 or uint16 [C, H, W] to size (h, w) between the nearest pixels, without antialias, as OpenCV does.

    OpenCV computes in fixed point, so that single values differ by one gray level.
    """
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0]
    return resized.round_().to(image.dtype)


def is_vertical_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Return whether Pillow 13 resizes the columns of an image (h, w) before its rows (measured).

    The intermediate image is rounded and clipped, so at sharp edges the order changes up to a dozen gray levels.
    Earlier versions of Pillow always took rows first, as torch does.
    """
    return old[0] > new[0] and 2 * (old[1] - new[1]) < old[0] - new[0]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size given as one side or as (h, w) as (h, w)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def short_side(size: tuple[int, int], target: int) -> tuple[int, int]:
    """Return the size (h, w) with short side `target` and the same aspect; the long side is truncated, as with PIL."""
    height, width = size
    return (target, int(target * width / height)) if height <= width else (int(target * height / width), target)


def covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size (h, w) of the same aspect that covers `target`, rounded as timm's ResizeKeepRatio."""
    ratio = min(side / wanted for side, wanted in zip(size, target))
    height, width = (round(side / ratio) for side in size)
    return height, width


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the central (h, w) of an image [..., H, W]; half a pixel is rounded to even, as in torchvision."""
    top, left = (round((side - target) / 2) for side, target in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]

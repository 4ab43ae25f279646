"""Images of any common kind as tensors: PIL images, NumPy arrays and tensors of other layouts and channels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskwise.errors import UserError
from maskwise.imaging.pil import orientation, to_gray, to_rgb, turned

LUMA = (19595, 38470, 7471)  # of 65536, as in Pillow (ITU-R 601-2)


def to_tensor(image, channels: int) -> Tensor:
    """Convert an image of any kind that `Transform` takes to a tensor [C, H, W] (or [B, C, H, W]) of these channels."""
    shape, is_tensor = list(getattr(image, "shape", ())), isinstance(image, Tensor)
    if isinstance(image, Image.Image):
        image = from_pil(image, channels)
    elif isinstance(image, np.ndarray):
        image = from_numpy(image, channels)
    elif not is_tensor:
        raise UserError(
            f"an image is a PIL image, a NumPy array [H, W, {channels}] or a tensor [{channels}, H, W]; this is a "
            f"{type(image).__name__}: {'open the file with PIL.Image.open' if is_path(image) else 'convert it'}"
        )
    image = checked_values(image)
    converted = with_channels(image, channels)
    if converted is None:
        hint = ""
        if is_tensor and image.shape[-1] in (1, 3, 4, channels):
            hint = ": give image.permute(2, 0, 1), or a NumPy array, which is [H, W, C]"
        raise UserError(f"the encoder takes images [{channels}, H, W]; this one is {shape}{hint}")
    return converted


def is_path(value) -> bool:
    """Return whether a value is the path of a file."""
    return isinstance(value, str) or hasattr(value, "__fspath__")


def from_pil(image: Image.Image, channels: int) -> Tensor:
    """Convert a PIL image of any mode to uint8 [C, H, W] of 1, 3 or 4 channels, upright."""
    if channels not in (1, 3, 4):
        raise UserError(f"the encoder takes {channels} channels; give tensors [{channels}, H, W] instead of PIL images")
    converted = {1: to_gray, 3: to_rgb, 4: lambda image: image.convert("RGBA")}[channels](image)
    pixels = turned(np.array(converted), orientation(image))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


def from_numpy(array: np.ndarray, channels: int) -> Tensor:
    """Convert [H, W] or [H, W, C], or [C, H, W] if only its first axis fits the channels, to a tensor [C, H, W]."""
    if array.dtype.kind not in "uf" or array.ndim not in (2, 3):
        raise UserError(
            f"a NumPy image is [H, W] or [H, W, {channels}] of uint8, uint16, or floats in 0..1; "
            f"this one is {list(array.shape)} of {array.dtype}"
        )
    pixels = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    if pixels.ndim == 2:
        return pixels[None]
    has_bands_last = array.shape[2] in (1, 3, 4, channels) or array.shape[0] != channels
    return pixels.permute(2, 0, 1).contiguous() if has_bands_last else pixels


def checked_values(image: Tensor) -> Tensor:
    """Return a tensor of an accepted type, at least [1, H, W]; floats as float32 in 0..1."""
    if image.ndim == 2:
        image = image[None]
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise UserError(f"an image is [C, H, W] and not empty; this one is {list(image.shape)}")
    if image.dtype in (torch.uint8, torch.uint16):
        return image
    if not image.is_floating_point():
        raise UserError(
            f"an image is uint8, uint16, or floats in 0..1; this one is {image.dtype}: give image.to(torch.uint8)"
        )
    image = image.float()
    low, high = (float(value) for value in image.aminmax())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"a float image holds values in 0..1; this one has {low:.4g} to {high:.4g}: give uint8, or scale it "
            "(the transform normalizes by mean and std itself)"
        )
    return image


def with_channels(image: Tensor, channels: int) -> Tensor | None:
    """Repeat gray, drop alpha or take the luma of a tensor [..., C, H, W]; None for other numbers of channels."""
    given = image.shape[-3]
    if given == channels:
        return image
    if channels == 3 and given == 1:
        return image.expand(*image.shape[:-3], 3, -1, -1)
    if channels == 3 and given == 4:
        return image[..., :3, :, :]
    if channels == 1 and given in (3, 4):
        return luma(image[..., :3, :, :])
    return None


def luma(image: Tensor) -> Tensor:
    """Return the gray [..., 1, H, W] of a color tensor [..., 3, H, W], of the same type, as Pillow's mode L."""
    bands = image.unbind(-3)
    if image.is_floating_point():
        gray = sum(band * (weight / 65536) for band, weight in zip(bands, LUMA))
        return gray.unsqueeze(-3)
    total = sum(band.to(torch.int64) * weight for band, weight in zip(bands, LUMA))
    return ((total + 0x8000) >> 16).to(image.dtype).unsqueeze(-3)


def to_uint8(image: Tensor) -> Tensor:
    """Convert uint8, uint16, or floats in 0..1 to uint8, rounded."""
    if image.dtype == torch.uint8:
        return image
    scale = 255 if image.is_floating_point() else 1 / 257
    return (image.float() * scale).round().to(torch.uint8)

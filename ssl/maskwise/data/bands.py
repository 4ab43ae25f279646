"""Images of any number of channels, and of sixteen bits: decoding them, and the colour operations that need no RGB."""

import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from maskwise.data import decode as rgb
from maskwise.data.batch import Colours
from maskwise.data.decode import MAX_PIXELS, CorruptImage, refuse_large
from maskwise.functional.picture import eight_bits, is_wide, opened, orientation, to_rgb, turned, wide

ARRAYS = (".npy",)
TOP = {torch.uint8: 255, torch.uint16: 65535}
NEEDS_RGB = ("saturation", "hue", "grey")


def decode(source, name: str | None = None, channels: int = 3, bits: int = 8, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a path or the bytes of a file to uint8, or with bits=16 uint16, [channels, H, W].

    Three channels of eight bits are what `decode.decode` gives. Else channels come from the bands of an image, the
    pages of a TIFF or the axis of an array file (`.npy`: uint8 or uint16, [H, W], [H, W, C] or [C, H, W]); one band
    is repeated where three are wanted, colours become luma where one is. Eight bits are widened so that 255 is 65535,
    sixteen keep their high byte where eight are wanted. Pillow itself reads colour images with eight bits.
    EXIF orientation and `max_pixels` as there. Raises CorruptImage for whatever cannot be read in full or has other channels.
    """
    if channels == 3 and bits == 8 and not is_array(source):
        return rgb.decode(source, name, max_pixels=max_pixels)
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "image")
    try:
        data = rgb.read(source)
        if is_array(source):
            pixels = planes(array_of(data), channels)
        else:
            with opened(io.BytesIO(data)) as image:
                refuse_large(image, max_pixels)
                pixels = upright(bands_of(image, channels), image)
    except Exception as error:  # decoders fed with damaged files raise nearly every type there is
        raise CorruptImage.because(name, error) from None
    return fitted(pixels, channels, bits, name)


def from_picture(image, name: str, channels: int = 3, bits: int = 8, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """A Pillow image or an array as `decode` gives it. Raises CorruptImage."""
    try:
        if not isinstance(image, Image.Image):
            pixels = planes(np.asarray(image), channels)
        else:
            refuse_large(image, max_pixels)
            plain = channels == 3 and bits == 8
            pixels = upright(np.array(to_rgb(image)).transpose(2, 0, 1) if plain else bands_of(image, channels), image)
    except Exception as error:  # lazy decoding: the file may be found damaged only now
        raise CorruptImage.because(name, error) from None
    return fitted(pixels, channels, bits, name)


def array_of(data: bytes) -> np.ndarray:
    """The array of a `.npy` file, which holds what its header says and nothing that could run. Raises ValueError."""
    held = io.BytesIO(data)
    version = np.lib.format.read_magic(held)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array file of version {version}")
    shape, fortran, dtype = readers[version](held)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are pickled code")
    if dtype.itemsize * math.prod(shape) != len(data) - held.tell():
        raise ValueError(f"an array file of {len(data)} bytes, which cannot be {list(shape)} of {dtype}")
    return np.frombuffer(data, dtype=dtype, offset=held.tell()).reshape(shape, order="F" if fortran else "C")


def upright(planes: np.ndarray, image: Image.Image) -> np.ndarray:
    """Planes [C, H, W] of a Pillow image as its EXIF orientation wants them seen."""
    return turned(planes.transpose(1, 2, 0), orientation(image)).transpose(2, 0, 1)


def is_array(source) -> bool:
    """Whether a source is an array file: by its name, or by its first bytes."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source[:6]) == b"\x93NUMPY"
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() in ARRAYS


def bands_of(image: Image.Image, channels: int) -> np.ndarray:
    """The bands of a Pillow image, uint8 or uint16 [C, H, W]; the pages of a many-page file are bands where they make up the number."""
    pages = getattr(image, "n_frames", 1)
    if pages == channels > 1:
        return np.concatenate([band(page) for page in ImageSequence.Iterator(image)])
    if not is_wide(image):
        wanted = {1: "L", 3: "RGB", 4: "CMYK" if image.mode == "CMYK" else "RGBA"}.get(channels)
        if wanted and image.mode != wanted and not (channels == 4 and image.mode == "RGB"):
            image = image.convert(wanted)
    return band(image)


def band(image: Image.Image) -> np.ndarray:
    """One page as uint8 or uint16 [C, H, W]."""
    if is_wide(image):
        return wide(image)[None]
    if image.mode == "F":
        return eight_bits(np.asarray(image))[None]
    if image.mode == "P":
        image = image.convert("RGB")
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def planes(array: np.ndarray, channels: int) -> np.ndarray:
    """An array of two or three axes as [C, H, W]; the axis as long as `channels` says is the bands', the last one first."""
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"an array of {array.dtype}; images are uint8 or uint16")
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(f"an array of {array.ndim} axes; images have 2 or 3")
    if array.shape[2] == channels or array.shape[2] < array.shape[0]:
        return np.ascontiguousarray(array.transpose(2, 0, 1))
    return array


def fitted(pixels: np.ndarray, channels: int, bits: int, name: str) -> torch.Tensor:
    """Planes [C, H, W] with the channels and bits that are wanted. Raises CorruptImage."""
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise CorruptImage(name, f"pixels of shape {pixels.shape}")
    if pixels.shape[0] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=0)
    if pixels.shape[0] != channels:
        raise CorruptImage(name, f"it has {pixels.shape[0]} channels and data.mean says {channels}")
    if bits == 8 and pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif bits == 16 and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * 257
    return torch.from_numpy(np.array(pixels, copy=not pixels.flags.writeable))


def left_out(channels: int) -> str | None:
    """The line that says which colour operations images of so many channels go without; None for RGB."""
    if channels == 3:
        return None
    return f"images of {channels} channel{'s' * (channels != 1)}: {', '.join(NEEDS_RGB[:-1])} and {NEEDS_RGB[-1]} need RGB and are left out; brightness, contrast, blur and solarize stay"


def augment(crops: torch.Tensor, params: Colours, mean, std) -> torch.Tensor:
    """uint8 or uint16 crops [n, C, H, W] and their colour parameters to normalised float32 on the same device.

    As `augment.augment`, without saturation, hue and grey unless there are three channels; contrast blends with the
    mean over all channels. mean, std: one number a channel, for values in 0..1.
    """
    from maskwise.data.augment import JITTER, blur, grey

    top = TOP[crops.dtype]
    images = crops.to(torch.float32)
    plan = params.planned().plan
    for op, first, last in plan.steps:
        if op in NEEDS_RGB and crops.shape[1] != 3:
            continue
        rows = plan.rows[first:last]
        chosen = images.index_select(0, rows)
        factor = params.factors[rows].view(-1, 4, 1, 1, 1)
        if op == "brightness":
            chosen = (chosen * factor[:, 0]).clamp(0, top)
        elif op == "contrast":
            middle = chosen.mean((1, 2, 3), keepdim=True)
            chosen = (middle + factor[:, 1] * (chosen - middle)).clamp(0, top)
        elif op == "blur":
            chosen = blur(chosen, params.sigma[rows], plan.reach)
        elif op == "solarize":
            chosen = torch.where(chosen <= top // 2, chosen, top - chosen)
        else:  # RGB of sixteen bits, by the eight-bit arithmetic
            chosen = chosen.mul(255 / top)
            if op == "grey":
                chosen = grey(chosen).expand_as(chosen)
            else:
                chosen = JITTER[op](chosen.floor(), factor[:, 2 if op == "saturation" else 3])
            chosen = chosen * (top / 255)
        images.index_copy_(0, rows, chosen)
    scale = torch.tensor([1 / (top * s) for s in std]).to(crops.device, non_blocking=True).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)]).to(crops.device, non_blocking=True).view(-1, 1, 1)
    return images.mul_(scale).add_(shift)

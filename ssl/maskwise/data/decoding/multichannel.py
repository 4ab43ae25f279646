"""Decode images of any number of channels, of eight or sixteen bits."""

import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from maskwise.data.decoding import image as rgb
from maskwise.data.decoding.image import MAX_PIXELS, CorruptImage, refuse_large
from maskwise.data.decoding.jpeg import read_header
from maskwise.imaging.pil import eight_bits, is_wide, opened, orientation, stretched, to_rgb, turned, wide

ARRAYS = (".npy",)
ValueRange = tuple[float, float]


def decode(
    source,
    name: str | None = None,
    channels: int = 3,
    bits: int = 8,
    *,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> torch.Tensor:
    """Decode a path or the bytes of a file to uint8, or with bits=16 uint16, [channels, H, W].

    8-bit RGB is decoded by `decoding.image.decode`. Otherwise channels come from the bands of an image, the pages of a
    TIFF or the axis of an array file (`.npy`: uint8 or uint16, [H, W], [H, W, C] or [C, H, W]). One band is repeated to
    three channels, colors become luma for one. 8-bit values are scaled so that 255 becomes 65535; 16-bit values keep
    their high byte for bits=8. Pillow reads color images with eight bits. EXIF orientation and `max_pixels` as in
    `decoding.image.decode`. value_range: the stored values that become black and white, of all but 8-bit values; arrays
    may then hold any integers or floats. Raises CorruptImage for incomplete files and for other numbers of channels.
    """
    if channels == 3 and bits == 8 and value_range is None and not is_array(source):
        return rgb.decode(source, name, max_pixels=max_pixels)
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "image")
    try:
        data = rgb.read(source)
        if is_array(source):
            pixels = planes(parse_npy(data), channels, value_range)
        else:
            with opened(io.BytesIO(data)) as image:
                refuse_large(image, max_pixels)
                rgb.refuse_slow(data, read_header(data))
                pixels = pixels_of(image, channels, bits, value_range)
    except UnidentifiedImageError:
        raise CorruptImage(name, rgb.what_it_is(data)) from None
    except Exception as error:  # damaged files raise nearly every exception type
        raise CorruptImage.because(name, error) from None
    return fit_channels(pixels, channels, bits, name)


def from_picture(
    image,
    name: str,
    channels: int = 3,
    bits: int = 8,
    *,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> torch.Tensor:
    """Convert a Pillow image or an array to the output of `decode`. Raises CorruptImage."""
    try:
        if not isinstance(image, Image.Image):
            pixels = planes(np.asarray(image), channels, value_range)
        else:
            refuse_large(image, max_pixels)
            pixels = pixels_of(image, channels, bits, value_range)
    except Exception as error:  # Pillow decodes lazily: a damaged file fails only here
        raise CorruptImage.because(name, error) from None
    return fit_channels(pixels, channels, bits, name)


def pixels_of(image: Image.Image, channels: int, bits: int, value_range: ValueRange | None) -> np.ndarray:
    """Return the upright planes of a Pillow image, uint8 or uint16 [C, H, W]."""
    if channels == 3 and bits == 8 and not (value_range and holds_wide_values(image)):
        return upright(np.array(to_rgb(image)).transpose(2, 0, 1), image)
    return upright(bands_of(image, channels, value_range), image)


def holds_wide_values(image: Image.Image) -> bool:
    """Return whether a Pillow image holds floats, or integers of more than 8 bits."""
    return is_wide(image) or image.mode == "F"


def stored_range(source) -> tuple[str, float, float] | None:
    """Return the kind of the stored values, integer or float, and between which two 99.8 % of them lie.

    None for 8-bit values and for what cannot be read. source: as of `decode`, or a Pillow image or an array.
    """
    try:
        if isinstance(source, (Image.Image, np.ndarray)):
            values = source
        else:
            data = rgb.read(source)
            values = parse_npy(data) if is_array(source) else opened(io.BytesIO(data))
        if isinstance(values, Image.Image):
            values = np.asarray(values) if holds_wide_values(values) else np.zeros(0, np.uint8)
        if values.dtype == np.uint8 or values.dtype.kind not in "iuf":
            return None
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, [0.1, 99.9], method="nearest").tolist()
    except Exception:  # unreadable images are reported where they are decoded
        return None
    return "float" if values.dtype.kind == "f" else "integer", low, high


def parse_npy(data: bytes) -> np.ndarray:
    """Parse a `.npy` file without unpickling. Raises ValueError for object arrays and for a wrong file size."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array file of version {version}")
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which could run code")
    if dtype.itemsize * math.prod(shape) != len(data) - stream.tell():
        raise ValueError(f"an array file of {len(data)} bytes cannot hold {list(shape)} values of {dtype}")
    return np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


def upright(planes: np.ndarray, image: Image.Image) -> np.ndarray:
    """Apply the EXIF orientation of a Pillow image to its planes [C, H, W]."""
    return turned(planes.transpose(1, 2, 0), orientation(image)).transpose(2, 0, 1)


def is_array(source) -> bool:
    """Return whether a source is an array file, by its name or its first bytes."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source[:6]) == b"\x93NUMPY"
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() in ARRAYS


def bands_of(image: Image.Image, channels: int, value_range: ValueRange | None = None) -> np.ndarray:
    """Extract the bands of a Pillow image, uint8 or uint16 [C, H, W]; as many pages as `channels` are read as bands."""
    pages = getattr(image, "n_frames", 1)
    if pages == channels > 1:
        return np.concatenate([band(page, value_range) for page in ImageSequence.Iterator(image)])
    if not is_wide(image):
        mode = {1: "L", 3: "RGB", 4: "CMYK" if image.mode == "CMYK" else "RGBA"}.get(channels)
        if mode and image.mode != mode and not (channels == 4 and image.mode == "RGB"):
            image = image.convert(mode)
    return band(image, value_range)


def band(image: Image.Image, value_range: ValueRange | None = None) -> np.ndarray:
    """Convert one page to uint8 or uint16 [C, H, W]."""
    if value_range and holds_wide_values(image):
        return stretched(np.asarray(image), value_range)[None]
    if is_wide(image):
        return wide(image)[None]
    if image.mode == "F":
        return eight_bits(np.asarray(image))[None]
    if image.mode == "P":
        image = image.convert("RGB")
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    return np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def planes(array: np.ndarray, channels: int, value_range: ValueRange | None = None) -> np.ndarray:
    """Convert an array of two or three axes to [C, H, W]; the last axis is the bands where its length fits."""
    if value_range and array.dtype != np.uint8 and array.dtype.kind in "iuf":
        array = stretched(array, value_range)
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"an array of {array.dtype}; images are uint8 or uint16, others need data.value_range")
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(f"an array of {array.ndim} axes; images have 2 or 3")
    if array.shape[2] == channels or array.shape[2] < array.shape[0]:
        return np.ascontiguousarray(array.transpose(2, 0, 1))
    return array


def fit_channels(pixels: np.ndarray, channels: int, bits: int, name: str) -> torch.Tensor:
    """Convert planes [C, H, W] to the given channels and bits. Raises CorruptImage where the channels differ."""
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise CorruptImage(name, f"pixels of shape {pixels.shape}")
    if pixels.shape[0] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=0)
    if pixels.shape[0] != channels:
        raise CorruptImage(name, f"{pixels.shape[0]} channels, but data.mean has {channels}")
    if bits == 8 and pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif bits == 16 and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * 257
    return torch.from_numpy(np.array(pixels, copy=not pixels.flags.writeable))

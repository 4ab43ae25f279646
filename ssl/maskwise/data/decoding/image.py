"""Decode an image file to an RGB uint8 tensor, or raise `CorruptImage` with the reason."""

import io
import os
import re
import stat
import warnings
from typing import Annotated

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from maskwise.bounds import Between
from maskwise.data.decoding.jpeg import JpegHeader, decode_jpeg, read_header
from maskwise.errors import printable
from maskwise.imaging.pil import opened, orientation, to_rgb, turned

MAX_PIXELS = 100_000_000
PixelLimit = Annotated[int, Between(1, 178_956_970)]  # above, Pillow refuses the image as a decompression bomb
MAX_BYTES = 1 << 30
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # ISO/IEC 23008-12, annex B
OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # in messages of Pillow: an address in memory
MAX_WORK = 1 << 32  # pixels times scans of a JPEG: about five seconds, ten times what an ordinary file takes at most

warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; the serious ones end as a CorruptImage


class CorruptImage(Exception):
    """Report an unreadable image: `.name` is the file, `.reason` one line, both printable."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = printable(name), printable(reason)
        super().__init__(f"{self.name}: {self.reason}")

    def __reduce__(self):
        return CorruptImage, (self.name, self.reason)

    @classmethod
    def because(cls, name: str, error: Exception) -> "CorruptImage":
        """Build it from the exception of a decoder; the same file gives the same reason in every process."""
        reason = OBJECT.sub("", " ".join(str(error).split())).strip(" :")
        return cls(name, reason[:200] or type(error).__name__)


def decode(
    source,
    name: str | None = None,
    decoder: str = "pil",
    shrink: int = 1,
    *,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> torch.Tensor:
    """Decode a path or the bytes of a file to uint8 [3, H, W] in 0..255 (a channels-last view).

    Gray is repeated, palettes are looked up, alpha is dropped, CMYK is converted, 16-bit values keep their high byte,
    floats are read as 0..1 where none is above 1 and as 0..255 otherwise. Only the first frame of an animation is read.
    upright: apply the EXIF orientation. More than `max_pixels` are refused from the header, before memory is allocated;
    so is a JPEG of so many scans that decoding would take minutes. decoder: of JPEGs, resolved by
    `jpeg.resolve_decoder`. shrink: 1, 2, 4 or 8; a JPEG is decoded at that fraction of its size, rounded up, other
    files in full.
    Raises CorruptImage for a file that cannot be decoded completely.
    """
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "image")
    try:
        data = read(source)
        header = read_header(data)
        refuse_slow(data, header)
        if decoder != "pil" and shrink == 1 and (header is None or header.height * header.width <= max_pixels):
            pixels = decode_jpeg(data, decoder, header)
            if pixels is not None:
                exif = orientation_of(data, header) if upright else 1
                if exif == 1:
                    return pixels
                return torch.from_numpy(turned(pixels.permute(1, 2, 0).numpy(), exif)).permute(2, 0, 1)
        with opened(io.BytesIO(data)) as image:
            refuse_large(image, max_pixels)
            if shrink > 1 and image.format == "JPEG":
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            pixels = np.array(to_rgb(image))
            if (
                upright
            ):  # read after decoding: Pillow applies the orientation of some formats itself while it loads them
                pixels = turned(pixels, orientation(image))
    except UnidentifiedImageError:
        raise CorruptImage(name, what_it_is(data)) from None
    except Exception as error:  # damaged files raise nearly every exception type
        raise CorruptImage.because(name, error) from None
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise CorruptImage(name, f"pixels of shape {pixels.shape}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read(source) -> bytes:
    """Read the bytes of a file; bytes are returned unchanged.

    Raises OSError, and ValueError for a pipe, a device or a file of more than 1 GiB.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return source
    # Without O_NONBLOCK, opening a pipe would block.
    handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes; images have at most {MAX_BYTES}")
        return file.readall()


def what_it_is(data: bytes) -> str:
    """Describe a file that is no image which can be read, by its first bytes."""
    start = bytes(data[:200]).lstrip().lower()
    if not data:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the image: run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image: download it again"
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        return "a HEIC image: pip install pillow-heif to read it"
    return "not an image in a format that can be read"


def refuse_large(image: Image.Image, max_pixels: int) -> None:
    """Raise ValueError for an image of too many pixels; only the header has been read so far."""
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_pixels={max_pixels}")


def refuse_slow(data: bytes, header: JpegHeader | None) -> None:
    """Raise ValueError for a JPEG with so many scans, each over all pixels, that decoding would take minutes."""
    if header is not None:
        scans = data.count(b"\xff\xda")
        if scans * header.height * header.width > MAX_WORK:
            raise ValueError(
                f"{scans} scans over {header.width} x {header.height} pixels would take too long to decode"
            )


def orientation_of(data: bytes, header: JpegHeader | None) -> int:
    """Return the EXIF orientation (1..8) of a JPEG, 1 where there is no header or no EXIF."""
    if header is None or not header.exif:
        return 1
    with opened(io.BytesIO(data)) as image:
        return orientation(image)

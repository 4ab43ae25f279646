"""Decode JPEGs with torchvision or torchcodec, restricted to files for which they give the same pixels as Pillow."""

import importlib.util
import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from maskwise.errors import UserError

NAMES = ("auto", "pil", "torchvision", "torchcodec")
PREFERRED = ("torchcodec", "torchvision", "pil")  # all use libjpeg; the first two avoid Pillow's copies
RGB = 3  # ImageReadMode.RGB of both torch decoders
START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@cache
def unavailable_reason(name: str) -> str:
    """Return why a decoder cannot be used on this machine, in a few words; "" where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_decoder(name)
    except Exception as error:  # a library built for another torch fails in as many ways as there are linkers
        return " ".join(str(error).split())[:120] or type(error).__name__
    return ""


def resolve_decoder(name: str) -> str:
    """Resolve `auto` to the fastest decoder that works. Raises UserError for a decoder that does not work."""
    if name == "auto":
        return next(decoder for decoder in PREFERRED if not unavailable_reason(decoder))
    if name not in NAMES:
        raise UserError(f"data.decoder is {name}; it must be one of {', '.join(NAMES)}")
    if unavailable_reason(name):
        raise UserError(
            f"data.decoder={name} does not work here ({unavailable_reason(name)}); "
            f"install {name} for this torch, or give data.decoder=auto for a new run"
        )
    return name


@cache
def load_decoder(name: str) -> Callable[[bytes], torch.Tensor] | None:
    """Load a decoder: bytes of a JPEG -> uint8 [3, H, W]; None for Pillow. Raises ImportError or OSError."""
    if name == "pil":
        return None
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError("not installed")
    if name == "torchcodec":
        from torchcodec.decoders import decode_jpeg

        return decode_jpeg
    # The operator alone: a torchvision built for another torch may fail to import while this library loads.
    torch.ops.load_library(next(Path(spec.origin).parent.glob("image*.[sp][oy]*")))
    return lambda data: torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB, False)


class JpegHeader(NamedTuple):
    """The stored height and width in pixels, the number of components, and whether EXIF or XMP is present."""

    height: int
    width: int
    components: int
    exif: bool


def read_header(data: bytes) -> JpegHeader | None:
    """Read the markers of a JPEG up to its frame; None where there is no frame."""
    place, exif = 2, False
    if data[:2] != b"\xff\xd8":
        return None
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        length = struct.unpack_from(">H", data, place + 2)[0]
        if marker in START_OF_FRAME:
            height, width, components = struct.unpack_from(">HHB", data, place + 5)
            return JpegHeader(height, width, components, exif)
        exif = exif or marker == 0xE1
        place += 2 + length
    return None


def decode_jpeg(data: bytes, name: str, header: JpegHeader | None) -> torch.Tensor | None:
    """Decode with a torch decoder where its pixels equal Pillow's stored pixels; None: decode with Pillow.

    Left to Pillow: anything but a JPEG of one or three components (CMYK is converted differently), EXIF for torchcodec,
    which applies the orientation by rules of its own, more pixels than Pillow's limit, and files that fail.
    """
    if header is None or header.components not in (1, 3):
        return None
    if header.height * header.width > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return None
    if header.exif and name == "torchcodec":
        return None
    try:
        return load_decoder(name)(data)
    except RuntimeError:
        return None

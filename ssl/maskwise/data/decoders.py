"""JPEG decoders beside Pillow's: which of them work here, and what each may be handed so that all give the same pixels."""

import importlib.util
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from maskwise.functional.errors import UserError

NAMES = ("auto", "pil", "torchvision", "torchcodec")
PREFERRED = ("torchcodec", "torchvision", "pil")  # all three rest on libjpeg; the first two hand over its rows without Pillow's copies
RGB = 3  # ImageReadMode.RGB of both torch decoders
START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@lru_cache(maxsize=None)
def trouble(name: str) -> str:
    """Why a decoder cannot be used here, in a few words; "" where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(name)
    except Exception as error:  # a library of another torch build fails in as many ways as there are linkers
        return " ".join(str(error).split())[:120] or type(error).__name__
    return ""


def resolved(name: str) -> str:
    """The decoder that a name means here: the fastest that works for `auto`. Raises UserError for one that does not work."""
    if name == "auto":
        return next(each for each in PREFERRED if not trouble(each))
    if name not in NAMES:
        raise UserError(f"data.decoder is {name}; it must be one of {', '.join(NAMES)}")
    if trouble(name):
        raise UserError(f"data.decoder={name} does not work here ({trouble(name)}); install {name} for this torch, or give data.decoder=auto")
    return name


@lru_cache(maxsize=None)
def function(name: str):
    """bytes of a JPEG -> uint8 [3, H, W], or None for Pillow, which `decode.decode` is. Raises ImportError or OSError where it cannot be loaded."""
    if name == "pil":
        return None
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError("not installed")
    if name == "torchcodec":
        from torchcodec.decoders import decode_jpeg

        return decode_jpeg
    # The operator alone: torchvision itself cannot be imported where only this part of it fits the installed torch.
    torch.ops.load_library(next(Path(spec.origin).parent.glob("image*.[sp][oy]*")))
    return lambda data: torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB, False)


class Header(NamedTuple):
    """What the markers of a JPEG say: stored height and width in pixels, number of components, whether it carries EXIF or XMP."""

    height: int
    width: int
    components: int
    exif: bool


def header(data: bytes) -> Header | None:
    """Read the markers of a JPEG up to its frame; None where they do not lead to one."""
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
            return Header(height, width, components, exif)
        exif = exif or marker == 0xE1
        place += 2 + length
    return None


def decode_jpeg(data: bytes, name: str, found: Header | None) -> torch.Tensor | None:
    """Decode with a torch decoder where it gives Pillow's stored pixels, else None, and Pillow is to be asked.

    Left to Pillow: whatever is not a JPEG of one or three components (CMYK is converted differently), orientation in EXIF
    where torchcodec would apply it by its own reading, more pixels than Pillow's limit, and whatever fails.
    """
    if found is None or found.components not in (1, 3) or found.height * found.width > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return None
    if found.exif and name == "torchcodec":
        return None
    try:
        return function(name)(data)
    except RuntimeError:
        return None

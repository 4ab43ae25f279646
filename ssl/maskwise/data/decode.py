"""One decoder for every image file: an RGB uint8 tensor or a `CorruptImage` that says why not."""

import io
import os
import stat
import warnings

import numpy as np
import torch
from PIL import Image

from maskwise.data.decoders import Header, decode_jpeg, header
from maskwise.functional.picture import opened, orientation, to_rgb, turned

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30
MAX_WORK = 1 << 32  # pixels times scans of a JPEG: some five seconds, where an honest file takes a tenth of that at most

warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what matters of them is a CorruptImage here


class CorruptImage(Exception):
    """An image that cannot be read; `.name` is the file, `.reason` one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return CorruptImage, (self.name, self.reason)

    @classmethod
    def because(cls, name: str, error: Exception) -> "CorruptImage":
        """Of whatever a decoder raised."""
        return cls(name, (" ".join(str(error).split()) or type(error).__name__)[:200])


def decode(source, name: str | None = None, decoder: str = "pil", shrink: int = 1, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> torch.Tensor:
    """Decode a path or the bytes of a file to uint8 [3, H, W] in 0..255 (a channels-last view).

    Grey is repeated, palettes are looked up, alpha is dropped, CMYK is converted, wider values keep their high byte and
    floats are taken as 0..1 where none is above 1, else as 0..255. Of an animation the first frame is taken.
    upright: turn the image as its EXIF orientation says. More than `max_pixels` are refused by what the header says,
    before memory is taken; so is a JPEG of so many scans that it would take minutes. decoder: of JPEGs, `pil`,
    `torchvision` or `torchcodec`, one that `decoders.resolved` returned. shrink: 1, 2, 4 or 8; a JPEG is decoded at
    that fraction of its size, rounded up, other files are read whole.
    Raises CorruptImage for whatever cannot be read in full.
    """
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "image")
    try:
        data = read(source)
        found = header(data)
        refuse_endless(data, found)
        if decoder != "pil" and shrink == 1 and (found is None or found.height * found.width <= max_pixels):
            pixels = decode_jpeg(data, decoder, found)
            if pixels is not None:
                turn = orientation_of(data, found) if upright else 1
                return pixels if turn == 1 else torch.from_numpy(turned(pixels.permute(1, 2, 0).numpy(), turn)).permute(2, 0, 1)
        with opened(io.BytesIO(data)) as image:
            refuse_large(image, max_pixels)
            if shrink > 1 and image.format == "JPEG":
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            pixels = np.array(to_rgb(image))
            if upright:
                pixels = turned(pixels, orientation(image))  # asked now: Pillow turns some formats itself while it loads them
    except Exception as error:  # decoders fed with damaged files raise nearly every type there is
        raise CorruptImage.because(name, error) from None
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise CorruptImage(name, f"pixels of shape {pixels.shape}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read(source) -> bytes:
    """The bytes of a file, given its path or themselves. Raises OSError, and ValueError for a pipe, a device or a file beyond all images."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return source
    handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe would be waited for
    with open(handle, "rb", buffering=0) as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no ordinary file")
        if about.st_size > MAX_BYTES:
            raise ValueError(f"it has {about.st_size} bytes, and images at most {MAX_BYTES}")
        return file.readall()


def refuse_large(image: Image.Image, most: int) -> None:
    """Raises ValueError for an image of more pixels, which its header tells and nothing has been decoded for."""
    if image.width * image.height > most:
        raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_pixels={most}")


def refuse_endless(data: bytes, found: Header | None) -> None:
    """Raises ValueError for a JPEG whose scans, each of which goes over all pixels, add up to minutes."""
    if found is not None:
        scans = data.count(b"\xff\xda")
        if scans * found.height * found.width > MAX_WORK:
            raise ValueError(f"{scans} scans over {found.width} x {found.height} pixels would take too long to decode")


def orientation_of(data: bytes, found: Header | None) -> int:
    """The orientation of a JPEG's bytes, whose `header` was found."""
    if found is None or not found.exif:
        return 1
    with opened(io.BytesIO(data)) as image:
        return orientation(image)

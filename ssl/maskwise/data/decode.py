"""One decoder for every image file: an RGB uint8 tensor or a `CorruptImage` that says why not."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskwise.data.decoders import decode_jpeg


class CorruptImage(Exception):
    """An image that cannot be read; `.name` is the file, `.reason` one line."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return CorruptImage, (self.name, self.reason)


def decode(source, name: str | None = None, decoder: str = "pil", shrink: int = 1) -> torch.Tensor:
    """Decode a path or the bytes of a file to uint8 [3, H, W] in 0..255 (a channels-last view).

    Grey is repeated, palettes are looked up, alpha is dropped, CMYK is converted and 16-bit values keep their
    high byte. Of an animation the first frame is taken. The EXIF orientation is not applied, as in the published
    pipelines (attmask.md 3: torchvision transforms on the stored pixels). Pillow's limit against decompression
    bombs stays on. decoder: of JPEGs, `pil`, `torchvision` or `torchcodec`, one that `decoders.resolved` returned.
    shrink: 1, 2, 4 or 8; a JPEG is decoded at that fraction of its size, rounded up, other files are read whole.
    Raises CorruptImage for whatever cannot be read in full.
    """
    name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "image")
    try:
        data = read(source)
        pixels = decode_jpeg(data, decoder) if decoder != "pil" and shrink == 1 else None
        if pixels is not None:
            return pixels
        with Image.open(io.BytesIO(data)) as image:
            if shrink > 1 and image.format == "JPEG":
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            pixels = np.array(to_rgb(image))
    except Exception as error:  # decoders fed with damaged files raise nearly every type there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImage(name, reason[:200]) from None
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise CorruptImage(name, f"pixels of shape {pixels.shape}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read(source) -> bytes:
    """The bytes of a file, given its path or themselves."""
    return source if isinstance(source, (bytes, bytearray, memoryview)) else Path(source).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB; 16-bit modes are scaled to 8 bits, not clipped."""
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    if image.mode == "F":
        return image.convert("L").convert("RGB")
    return image.convert("RGB")

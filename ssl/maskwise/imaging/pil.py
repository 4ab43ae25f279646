"""Pillow images: opening, EXIF orientation, conversion of any mode to 8-bit RGB."""

import numpy as np
from PIL import ExifTags, Image

from maskwise.imaging.formats import readable

BITS_PER_SAMPLE = 258  # of TIFF
# EXIF orientation -> (exchange rows and columns, then reverse rows, reverse columns) (CIPA DC-008, 4.6.5.1)
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def opened(file) -> Image.Image:
    """Open a file as a Pillow image without decoding it; only formats that are decoded inside this process."""
    return Image.open(file, formats=readable())


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (as stored) to 8; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF may be malformed while the pixels are fine
        return 1
    return value if value in TURNS else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to stored pixels [H, W, ...]; the result is contiguous if anything was changed."""
    if orientation not in TURNS:
        return pixels
    exchange, rows, columns = TURNS[orientation]
    pixels = pixels.swapaxes(0, 1) if exchange else pixels
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB; wide modes are scaled to 8 bits, not clipped."""
    if image.mode == "RGB":
        return image
    if is_wide(image) or image.mode == "F":
        return to_gray(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def to_gray(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to 8-bit gray; wide modes are scaled to 8 bits, not clipped."""
    if is_wide(image):
        return Image.fromarray((wide(image) >> 8).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(eight_bits(np.asarray(image)))
    return image.convert("L")


def is_wide(image: Image.Image) -> bool:
    """Return whether a Pillow image holds integers of more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def wide(image: Image.Image) -> np.ndarray:
    """Return an image of more than 8 bits as uint16 [H, W], shifted to the full range (12-bit TIFF)."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    tag = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 16)
    bits = tag[0] if isinstance(tag, tuple) else tag
    return (values << (16 - bits) if 8 < bits < 16 else values).clip(0, 65535).astype(np.uint16)


def stretched(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Scale values so that `value_range` becomes 0..65535, uint16; what lies outside is cut, NaN becomes 0."""
    low, high = value_range
    shares = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return (np.nan_to_num(shares, nan=0.0) * 65535).round().astype(np.uint16)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Convert floats to uint8: from 0..1 if none is above 1, else from 0..255; NaN and infinities become 0."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return (values * (255 if values.max(initial=0) <= 1 else 1)).round().clip(0, 255).astype(np.uint8)

"""Pillow images of any mode and orientation as they are to be seen."""

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "DIB", "PCX", "QOI", "TGA")  # EPS would start Ghostscript
BITS_PER_SAMPLE = 258  # of TIFF
TURNS = {  # EXIF orientation -> what to do with rows and columns: exchange them, then reverse rows, reverse columns (CIPA DC-008, 4.6.5.1)
    2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip


def opened(file) -> Image.Image:
    """A file as a Pillow image, not yet decoded; only formats that are decoded inside this process."""
    return Image.open(file, formats=FORMATS)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a Pillow image, 1 (as stored) to 8; 1 where there is none or it makes no sense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # anyone writes EXIF, and the pixels are sound all the same
        return 1
    return value if value in TURNS else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [H, W, ...] as they are to be seen; contiguous where they were turned."""
    if orientation not in TURNS:
        return pixels
    exchange, rows, columns = TURNS[orientation]
    pixels = pixels.swapaxes(0, 1) if exchange else pixels
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB; wide modes are scaled to 8 bits, not clipped."""
    if image.mode == "RGB":
        return image
    if is_wide(image):
        return Image.fromarray((wide(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    if image.mode == "F":
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Whether a Pillow image holds whole numbers beyond 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def wide(image: Image.Image) -> np.ndarray:
    """A wide image as uint16 [H, W] over the whole range: a TIFF of 12 bits, say, is shifted up."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    said = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 16)
    bits = said[0] if isinstance(said, tuple) else said
    return (values << (16 - bits) if 8 < bits < 16 else values).clip(0, 65535).astype(np.uint16)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Floats as uint8: of 0..1 where none is above 1, else of 0..255; what is no number is black."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return (values * (255 if values.max(initial=0) <= 1 else 1)).round().clip(0, 255).astype(np.uint8)

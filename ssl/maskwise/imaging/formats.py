"""Image formats that are read: Pillow's names, and the endings of their files."""

import contextlib
from functools import cache

from PIL import Image, features

# Formats that are decoded inside this process (EPS would start Ghostscript); the content decides, not the ending.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "ICO": (".ico",),
    "DIB": (".dib",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "TGA": (".tga",),
    "HEIF": (".heic", ".heif", ".hif"),
}
CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # parts that a build of Pillow may lack


def readable() -> tuple[str, ...]:
    """Return the formats that can be read here; HEIF where a package has registered a decoder with Pillow."""
    register_heif()
    return tuple(name for name in FORMATS if is_readable(name))


def is_readable(name: str) -> bool:
    """Return whether a format of FORMATS can be read here."""
    return "HEIF" in Image.OPEN if name == "HEIF" else has_codec(name)


@cache
def has_codec(name: str) -> bool:
    """Return whether this build of Pillow decodes a format."""
    return name not in CODECS or features.check(CODECS[name])


@cache
def register_heif() -> None:
    """Register the decoder of pillow-heif with Pillow where that package is installed."""
    if "HEIF" not in Image.OPEN:
        with contextlib.suppress(Exception):  # absent, or built for another system
            import pillow_heif

            pillow_heif.register_heif_opener()


def common_endings() -> str:
    """Return the first ending of each format that can be read here, for messages."""
    return " ".join(FORMATS[name][0][1:] for name in readable())


def endings() -> tuple[str, ...]:
    """Return the endings of files that can be read here, in lower case."""
    return tuple(ending for name in readable() for ending in FORMATS[name])

"""Damaged image files of ten kinds, each a function of (seed, kind, number), with their expected outcomes.

Intact files are drawn from the embedded `shapes` and saved by Pillow in fifteen formats, so that a corpus can be made
anywhere. The expected outcome is `readable`, `refused`, or `either`: damage that may or may not be detected.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

FORMS = {
    "jpeg": ("RGB", "JPEG", {"quality": 90}),
    "jpeg_progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg_gray": ("L", "JPEG", {}),
    "jpeg_cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png_palette": ("P", "PNG", {}),
    "png_alpha": ("RGBA", "PNG", {}),
    "png_16": ("I;16", "PNG", {}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "bmp_palette": ("P", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff_lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "webp": ("RGB", "WEBP", {}),
    "webp_lossless": ("RGB", "WEBP", {"lossless": True}),
}
EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp"}
PALETTES = ("gif", "bmp_palette", "png_palette")


def sound(form: str, number: int, seed: int) -> bytes:
    """An undamaged file: image `number` of the embedded set, cut to an odd size, in one of the forms."""
    from maskwise.data.datasets.shapes import Shapes

    rng = random.Random(f"{seed} {form} {number}")
    mode, kind, options = FORMS[form]
    height, width = rng.randint(33, 96), rng.randint(33, 96)
    pixels = Shapes(count=64, size=96, seed=seed).image(number % 64).permute(1, 2, 0).numpy()[:height, :width]
    image = Image.fromarray(pixels)
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def truncated(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """The first 2 to 80 per cent of a file."""
    return data[: int(len(data) * rng.uniform(0.02, 0.8))], "refused"


def header(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """One to four bytes among the first 64 changed."""
    return changed(data, range(min(64, len(data))), rng.randint(1, 4), rng), "either"


def tables(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """Change up to eight bytes of quantization and Huffman tables, palettes or directories."""
    if form.startswith("jpeg"):
        places = [
            place
            for marker, start, length in segments(data)
            if marker in (0xDB, 0xC4, 0xDA)
            for place in range(start + 4, start + 2 + length)
        ]
        return changed(data, places, rng.randint(1, 8), rng), "either"
    if form.startswith("png"):
        name = b"PLTE" if form == "png_palette" else b"IDAT"
        start, length = next((start, length) for kind, start, length in chunks(data) if kind == name)
        return mended(
            changed(data, range(start + 8, start + 8 + min(length, 64)), rng.randint(1, 8), rng), start
        ), "readable" if name == b"PLTE" else "either"
    first, last = {
        "gif": (13, 13 + 3 * 2 ** ((data[10] & 7) + 1)),
        "bmp_palette": (54, 54 + 1024),
        "bmp": (14, 54),
        "webp": (12, 44),
        "webp_lossless": (12, 44),
    }.get(form, (0, 0))
    if form.startswith("tiff"):
        first = struct.unpack_from("<I", data, 4)[0]
        last = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    return changed(
        data, range(first, min(last, len(data))), rng.randint(1, 8), rng
    ), "readable" if form in PALETTES else "either"


def huge(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """Width and height in the header beyond a hundred million pixels."""
    side = rng.randint(16000, 65000)
    data = bytearray(data)
    if form.startswith("jpeg"):
        start = next(start for marker, start, _ in segments(bytes(data)) if marker in (0xC0, 0xC1, 0xC2))
        struct.pack_into(">HH", data, start + 5, side, side)
    elif form.startswith("png"):
        struct.pack_into(">II", data, 16, side * rng.choice((1, 1000)), side)
        return mended(bytes(data), 8), "refused"
    elif form == "gif":
        struct.pack_into("<HH", data, 6, side, side)
        struct.pack_into("<HH", data, data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1)) + 5, side, side)
    elif form.startswith("bmp"):
        struct.pack_into("<ii", data, 18, side * rng.choice((1, 1000)), rng.choice((-1, 1)) * side)
    elif form.startswith("tiff"):
        first = struct.unpack_from("<I", data, 4)[0]
        for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
            if struct.unpack_from("<H", data, entry)[0] in (256, 257):
                struct.pack_into("<HII", data, entry + 2, 4, 1, side * rng.choice((1, 1000)))
    elif form == "webp":
        place = data.index(b"\x9d\x01\x2a") + 3
        struct.pack_into("<HH", data, place, 16383, rng.randint(8000, 16383))
    else:  # lossless: two sides of fourteen bits after its signature
        struct.pack_into("<I", data, data.index(b"VP8L") + 9, 16382 | rng.randint(8000, 16382) << 14)
    return bytes(data), "refused"


def lengths(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """The length of a segment, chunk, block or strip is a lie."""
    data = bytearray(data)
    lie = rng.choice((0, 1, 2, rng.randrange(1 << 16), 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
    if form.startswith("jpeg"):
        struct.pack_into(">H", data, rng.choice([start for _, start, _ in segments(bytes(data))]) + 2, lie & 0xFFFF)
    elif form.startswith("png"):
        struct.pack_into(">I", data, rng.choice([start for _, start, _ in chunks(bytes(data))]), lie)
    elif form == "gif":
        data[rng.randrange(data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1)) + 10, len(data))] = lie & 0xFF
    elif form.startswith("bmp"):
        struct.pack_into("<I", data, rng.choice((2, 10, 14, 34, 46)), lie)
    elif form.startswith("tiff"):
        first = struct.unpack_from("<I", data, 4)[0]
        struct.pack_into(
            "<I",
            data,
            first + 2 + 12 * rng.randrange(struct.unpack_from("<H", data, first)[0]) + rng.choice((4, 8)),
            lie,
        )
    else:
        struct.pack_into("<I", data, rng.choice((4, 16)), lie)
    return bytes(data), "either"


def misnamed(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """A sound file with another format's extension."""
    return data, "readable"


def appended(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """A sound file with up to five thousand bytes behind its end."""
    return data + rng.choice((rng.randbytes(rng.randint(1, 5000)), bytes(rng.randint(1, 5000)), data)), "readable"


def empty(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """No bytes, or nothing but zeros or blanks as some failed copies leave them."""
    return rng.choice((b"", bytes(rng.randint(1, 9000)), b" " * rng.randint(1, 9000))), "refused"


def swapped(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """The second half before the first."""
    return data[len(data) // 2 :] + data[: len(data) // 2], "refused"


def noise(data: bytes, form: str, rng: random.Random) -> tuple[bytes, str]:
    """Random bytes; every other time behind the first bytes of a real file."""
    rest = rng.randbytes(rng.randint(1, 20000))
    return (rest, "refused") if rng.random() < 0.5 else (data[: rng.randint(8, 40)] + rest, "either")


KINDS = {
    "truncated": truncated,
    "header": header,
    "tables": tables,
    "huge": huge,
    "lengths": lengths,
    "misnamed": misnamed,
    "appended": appended,
    "empty": empty,
    "swapped": swapped,
    "noise": noise,
}
UNCHANGED = ("misnamed", "appended")  # pixels are those of the sound file


def write(folder: Path, count: int, seed: int = 0) -> list[dict]:
    """Write `count` files of every kind, the kinds in turn, and expectations.csv before any is read; returns its rows.

    `base` of a row is the SHA-256 of the intact file; it is stored in sound/ under that name if pixels are compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sound").mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        for kind, damage in KINDS.items():
            rng = random.Random(f"{seed} {kind} {number}")
            form = list(FORMS)[number % len(FORMS)]
            whole = sound(form, number, seed)
            data, verdict = damage(whole, form, rng)
            extension = EXTENSIONS[FORMS[form][1]]
            if kind == "misnamed":
                extension = rng.choice([other for other in EXTENSIONS.values() if other != extension])
            name, base = f"{kind}_{number:04d}_{form}{extension}", hashlib.sha256(whole).hexdigest()
            (folder / name).write_bytes(data)
            if kind in UNCHANGED:
                (folder / "sound" / base).write_bytes(whole)
            rows.append(
                {
                    "path": name,
                    "kind": kind,
                    "form": form,
                    "verdict": verdict,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "base": base,
                }
            )
    with open(folder / "expectations.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return rows


def changed(data: bytes, places, count: int, rng: random.Random) -> bytes:
    """Some bytes at some of these places become others."""
    data, places = bytearray(data), list(places)
    for place in rng.sample(places, min(count, len(places))):
        data[place] ^= rng.randint(1, 255)
    return bytes(data)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, offset, length field) of a JPEG's segments up to its first scan."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        length = struct.unpack_from(">H", data, place + 2)[0]
        yield data[place + 1], place, length
        if data[place + 1] == 0xDA:
            return
        place += 2 + length


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, offset, length) of a PNG's chunks."""
    place = 8
    while place + 12 <= len(data):
        length = struct.unpack_from(">I", data, place)[0]
        yield data[place + 4 : place + 8], place, length
        place += 12 + length


def mended(data: bytes, start: int) -> bytes:
    """A PNG with the checksum of the chunk at `start` made right again."""
    length = struct.unpack_from(">I", data, start)[0]
    end = start + 8 + length
    return data[:end] + struct.pack(">I", zlib.crc32(data[start + 4 : end])) + data[end + 4 :]

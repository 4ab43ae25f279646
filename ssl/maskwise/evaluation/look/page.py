"""One HTML file with the maps of several images: style, program and data inline, opened from disk without a server."""

from __future__ import annotations

import base64
import html
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskwise.evaluation.look.codes import Codes, colors, encode
from maskwise.evaluation.look.maps import DRAWN, RATIOS, Layer, Maps
from maskwise.imaging.web_page import data_address

MAP_BYTES = 3 << 20  # of attention maps in a page, before compression: the first blocks are left out beyond
CODE_BYTES = 3 << 20  # of patch tokens
LEAST_DIRECTIONS, MOST_DIRECTIONS = 16, 384
MOST_PIXELS = 1024  # of a picture's longer side; maps do not depend on it
TITLES = {
    "attmask_high": "AttMask-High",
    "attmask_low": "AttMask-Low",
    "attmask_hint": "AttMask-Hint",
    "block": "block-wise",
    "random": "random",
}


@dataclass
class Packed:
    """One image as the page stores it: facts as JSON, arrays by name, and the codes from which colors are made."""

    facts: dict
    arrays: dict[str, np.ndarray]
    codes: Codes


@dataclass(frozen=True)
class Settings:
    """First state of the page: title and line below it, masking, ratio, mass, and the point (x, y), 0 to 1."""

    title: str
    about: str
    masking: str = "attmask_high"
    ratio: float = 0.5
    mass: float = 0.6
    point: tuple[float, float] | None = None


def pack(maps: Maps, count: int) -> Packed:
    """Quantize the maps of one of `count` images to bytes, so that the page stays a few megabytes."""
    layers = last_layers(maps.layers, count, len(maps.tokens))
    patches = len(maps.tokens)
    directions = min(MOST_DIRECTIONS, max(LEAST_DIRECTIONS, CODE_BYTES // (count * patches)))
    codes = encode(maps.tokens, directions)
    height, width = maps.image.shape[:2]
    facts = {
        "name": maps.name,
        "size": [height, width],
        "original": list(maps.original),
        "grid": list(maps.grid),
        "picture": jpeg(maps.image),
        "boxes": {name: [round(value, 2) for value in box] for name, box in maps.boxes.items()},
        "layers": [{"title": layer.title, "heads": len(layer.heads)} for layer in layers],
        "code_scale": codes.scale,
        "code_error": round(codes.error, 4),
    }
    arrays = {"codes": codes.values.numpy()}
    if layers:
        arrays["maps"], facts["map_scales"] = quantized(torch.cat([with_merged(layer) for layer in layers]))
    for name, mask in maps.masks.items():
        arrays[f"mask_{name}"] = steps(mask)
    return Packed(facts, arrays, codes)


def last_layers(layers: Sequence[Layer], count: int, patches: int) -> Sequence[Layer]:
    """Return as many of the last layers as fit into the page's bytes, at least one."""
    room, chosen = MAP_BYTES // (count * patches), []
    for layer in reversed(layers):
        room -= 1 + len(layer.heads)
        if chosen and room < 0:
            break
        chosen.insert(0, layer)
    return chosen


def with_merged(layer: Layer) -> Tensor:
    """Return the maps of a layer, [1 + H, N]: the merged one, then the heads; a single head is not repeated."""
    return layer.merged[None] if len(layer.heads) == 1 else torch.cat([layer.merged[None], layer.heads])


def quantized(maps: Tensor) -> tuple[np.ndarray, list[float]]:
    """Return maps [M, N] of values from 0 as uint8 and each one's maximum: value = maximum * (code / 255)^2.

    The root keeps small values apart: those of 1 % of the maximum still have 26 levels below them.
    """
    most = maps.amax(dim=1, keepdim=True).clamp(min=1e-30)
    values = ((maps.clamp(min=0) / most).sqrt() * 255).round().to(torch.uint8)
    return values.numpy(), [float(f"{value:.6g}") for value in most[:, 0].tolist()]


def steps(masks: Tensor) -> np.ndarray:
    """Return masks bool [R, N] as bits, uint8 [R, ceil(N / 8)]: the first, then the changes from each to the next."""
    bits = masks.numpy()
    return np.packbits(np.concatenate([bits[:1], bits[1:] ^ bits[:-1]]), axis=1)


def jpeg(image: np.ndarray) -> str:
    """Return a picture as the address of inline JPEG data."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    picture.save(buffer, format="JPEG", quality=88)
    return data_address(buffer.getvalue(), "image/jpeg")


def page(images: Sequence[Packed], settings: Settings) -> str:
    """Return the HTML of packed images."""
    data = {
        "ratios": len(RATIOS),
        "masking": settings.masking,
        "ratio": round(settings.ratio * 100),
        "mass": round(settings.mass * 100),
        "point": settings.point,
        "maskings": [[name, TITLES[name]] for name in DRAWN],
        "colormap": colormap("inferno"),
        "images": [
            facts(image, colored.numpy()) for image, colored in zip(images, colors([image.codes for image in images]))
        ],
    }
    text = part("page.html")
    for mark, value in {
        "{{style}}": part("page.css"),
        "{{program}}": part("page.js"),
        "{{title}}": html.escape(settings.title),
        "{{about}}": html.escape(settings.about),
        "{{data}}": script_json(data),
    }.items():
        text = text.replace(mark, value)
    return text


def facts(image: Packed, colored: np.ndarray) -> dict:
    """Return the JSON of one image: its facts, and its arrays as one compressed text with a table of their places."""
    parts, table, start = [], {}, 0
    for name, array in {**image.arrays, "colors": colored}.items():
        parts.append(np.ascontiguousarray(array).tobytes())
        table[name] = [start, len(parts[-1])]
        start += len(parts[-1])
    return {**image.facts, "arrays": table, "bytes": base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()}


def script_json(data: Mapping) -> str:
    """Return JSON that may stand in a <script> element: no `<` can end it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def colormap(name: str) -> str:
    """Return the 256 colors of a colormap of matplotlib, RGB, as base64."""
    from matplotlib import colormaps

    return base64.b64encode(colormaps[name](np.arange(256), bytes=True)[:, :3].tobytes()).decode()


def part(name: str) -> str:
    """Return a file of this package as text."""
    return files("maskwise.evaluation.look").joinpath(name).read_text(encoding="utf-8")

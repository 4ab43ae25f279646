"""Pictures of a model on images: sheets as PNG, an interactive page as HTML, numbers as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskwise.build.crops import masking_rule, uint8_crops
from maskwise.build.images import value_range_of
from maskwise.build.models import model_title, opened_model
from maskwise.engine.atomic_file import write_atomic, write_error
from maskwise.errors import UserError
from maskwise.evaluation.look.codes import Codes, colors, encode
from maskwise.evaluation.look.maps import BOXES, DRAWN, RATIOS, Maps, maps_of
from maskwise.evaluation.look.page import Packed, Settings, pack, page
from maskwise.evaluation.look.pictures import Pictures, opened_pictures
from maskwise.evaluation.look.sheet import bands_of
from maskwise.functional.attention import mass_mask
from maskwise.imaging.drawing import write_png
from maskwise.imaging.panels import panel_sheet
from maskwise.methods.masking import MASKINGS
from maskwise.nn.encoder import pooling_name
from maskwise.process.progress import counted
from maskwise.process.streams import print_notice

PAGE_ENDINGS = (".html", ".htm")
PAGE, NUMBERS = "look.html", "look.json"  # in a folder
MASS = 0.6
SHEET_DIRECTIONS = 64  # in which patch tokens are kept for the colors of a sheet


@dataclass(frozen=True)
class LookOptions:
    """Options of `maskwise.api.look`, which describes them."""

    masking: str | None
    ratio: float
    mass: float | None
    blocks: bool
    beside: tuple[str, ...]
    size: int | None
    limit: int
    point: Sequence[float] | None
    json: str | os.PathLike | None = None


def draw(model, encoder, images: Sequence, out: Path, chosen: LookOptions) -> Path:
    """Draw what `maskwise.api.look` describes. Raises UserError for options that do not fit, before an image is read.

    Files are written at the end, each at once.
    """
    check(out, chosen)
    is_page, is_folder = out.suffix.lower() in PAGE_ENDINGS, not out.suffix
    has_crops = chosen.masking is not None or chosen.blocks or chosen.beside or chosen.mass is not None
    if not (is_page or is_folder) and has_crops:
        save_png(out, crop_sheet(model, encoder, images, chosen))
        return out
    check_attention(encoder, chosen.masking)
    pictures = opened_pictures(images, len(encoder.mean), value_range_of(model), chosen.limit)
    for note in pictures.notes:
        print_notice(f"look: {note}")
    collected = collect(encoder, pictures, chosen, packs=is_page or is_folder, sheets=not is_page)
    if is_page or is_folder:
        title, about = f"maskwise look: {model_title(model)}", model_about(encoder)
        first = Settings(title, about, chosen.masking or DRAWN[0], chosen.ratio, chosen.mass or MASS, chosen.point)
        save_text(out / PAGE if is_folder else out, page(collected.packed, first))
    if is_folder:
        for name, sheet in zip(file_names(collected.maps), sheets(collected, chosen)):
            save_png(out / name, sheet)
        save_text(out / NUMBERS, json.dumps(collected.records, indent=1))
    elif not is_page:
        save_png(out, np.concatenate(list(sheets(collected, chosen))))
    if chosen.json is not None:
        save_text(Path(chosen.json), json.dumps(collected.records, indent=1))
    return out


def check(out: Path, chosen: LookOptions) -> None:
    """Raise UserError for options that are out of range, or that the kind of output does not take."""
    ratio, mass, limit, point = chosen.ratio, chosen.mass, chosen.limit, chosen.point
    if chosen.masking is not None and chosen.masking not in MASKINGS:
        raise UserError(f"no masking {chosen.masking}; there are {', '.join(MASKINGS)}")
    if not is_number(ratio) or not 0 <= ratio <= 1:
        raise UserError(f"look: ratio is {ratio}; it must be from 0 to 1")
    if mass is not None and not (is_number(mass) and 0 < mass <= 1):
        raise UserError(f"look: mass is {mass}; it must be above 0 and at most 1, such as 0.6")
    for name, value, unit in (("size", chosen.size, "pixels"), ("limit", limit, "images")):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"look: {name} is {value}; it must be a number of {unit}")
    if point is not None and not is_point(point):
        raise UserError(f"look: point is {point}; give x and y from 0 to 1, such as point=[.5,.3]")
    drawn_whole = out.suffix.lower() in PAGE_ENDINGS or not out.suffix
    if not drawn_whole and out.suffix.lower() != ".png":
        raise UserError(f"look: {out} is no PNG, HTML or folder; end it with .png or .html")
    if drawn_whole and (chosen.blocks or chosen.beside):
        raise UserError("look: blocks and beside draw a PNG sheet, and the page has every block; leave them out")
    if drawn_whole and chosen.masking not in (None, *DRAWN):
        raise UserError(f"look: the page has the maskings {', '.join(DRAWN)}; choose one of them")


def is_number(value) -> bool:
    """Return whether a value is a number, truth values aside."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_point(value) -> bool:
    """Return whether a value is (x, y), each from 0 to 1."""
    is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    return is_pair and all(is_number(each) and 0 <= each <= 1 for each in value)


def check_attention(encoder, masking: str | None) -> None:
    """Raise UserError for a masking by attention that the encoder's pooling does not give."""
    attends = getattr(getattr(encoder, "pooling", None), "gives_attention", False)
    if masking is not None and MASKINGS[masking].needs_attention and not attends:
        raise UserError(f"look: this model gives no attention to mask by; {masking} needs it: choose random or block")


def crop_sheet(model, encoder, images: Sequence, chosen: LookOptions) -> np.ndarray:
    """Draw the crops that the model was made for: one masking's masks, or the figures of SimPool's appendix."""
    import torch

    from maskwise.evaluation.suite.attention_sheets import training_sheet
    from maskwise.evaluation.suite.figure_sheets import figure_sheet

    if chosen.json is not None:
        raise UserError("look: --json goes with whole images; leave out masking, mass, blocks and beside")
    if chosen.beside or chosen.blocks or chosen.mass is not None:
        if chosen.masking is not None:
            raise UserError("look: masking draws another sheet than mass, blocks and beside; leave it or them out")
        models = [(model_title(model), encoder)]
        models += [(model_title(each), opened_model(each, {})) for each in chosen.beside]
        crops = uint8_crops(encoder, images, value_range_of(model), chosen.size)
        return figure_sheet(models, crops, mass=chosen.mass, blocks=chosen.blocks)
    rule = masking_rule(encoder, chosen.masking, chosen.ratio)
    crops = uint8_crops(encoder, images, value_range_of(model), chosen.size)
    return training_sheet(encoder, crops, rule, torch.arange(len(crops)))


@dataclass
class Collected:
    """Results of all images: for the page, for sheets, and as numbers."""

    packed: list[Packed]
    maps: list[Maps]
    codes: list[Codes]
    records: list[dict]


def collect(encoder, pictures: Pictures, chosen: LookOptions, *, packs: bool, sheets: bool) -> Collected:
    """Run the encoder on every image and keep what the outputs need. Raises UserError where none can be read."""
    collected = Collected([], [], [], [])
    for number, (name, image) in enumerate(counted(pictures, pictures.count, "images", "img")):
        maps = maps_of(encoder, image, name, number, side=chosen.size)
        collected.records.append(record_of(maps, chosen.ratio, chosen.mass or MASS))
        if packs:
            collected.packed.append(pack(maps, pictures.count))
        if sheets:
            collected.maps.append(maps)
            collected.codes.append(encode(maps.tokens, SHEET_DIRECTIONS))
    if not collected.records:
        raise UserError("look: none of the images can be read")
    return collected


def sheets(collected: Collected, chosen: LookOptions) -> Iterator[np.ndarray]:
    """Draw the sheet of each image, uint8 [H, W, 3]."""
    for maps, colored in zip(collected.maps, colors(collected.codes)):
        bands = bands_of(maps, colored, ratio=chosen.ratio, mass=chosen.mass or MASS, point=chosen.point)
        yield panel_sheet(bands)


def record_of(maps: Maps, ratio: float, mass: float) -> dict:
    """Return the numbers of one image: sizes as [height, width], boxes in pixels of the original, counts of patches.

    `patches_of_mass`: for each layer of attention, how many patches hold the mass of the merged map and of each head.
    """
    factors = [whole / seen for whole, seen in zip(maps.original, maps.image.shape[:2])][::-1] * 2
    step = round(ratio * (len(RATIOS) - 1))
    return {
        "name": maps.name,
        "original": list(maps.original),
        "size": list(maps.image.shape[:2]),
        "grid": list(maps.grid),
        "boxes": {
            name: [round(value * factor, 2) for value, factor in zip(maps.boxes[title], factors)]
            for name, title in BOXES.items()
            if title in maps.boxes
        },
        "ratio": RATIOS[step],
        "masked": {name: int(mask[step].sum()) for name, mask in maps.masks.items()},
        "mass": mass,
        "patches_of_mass": {
            layer.title: {
                "merged": int(mass_mask(layer.merged[None], mass).sum()),
                "heads": mass_mask(layer.heads, mass).sum(dim=1).tolist(),
            }
            for layer in maps.layers
        },
    }


def model_about(encoder) -> str:
    """Return what a page says of a model: network, pooling and size."""
    backbone, pooling = getattr(encoder, "backbone", None), getattr(encoder, "pooling", None)
    parts = [] if backbone is None else [backbone.name]
    parts += [] if pooling is None else [f"pooling {pooling_name(pooling)}"]
    height, width = encoder.image_size
    return ", ".join([*parts, f"made for {width} x {height} pixels"])


def file_names(images: Sequence[Maps]) -> list[str]:
    """Return a file name for each image's sheet, after the image's own; equal ones are numbered."""
    names: dict[str, None] = {}
    for maps in images:
        stem = re.sub(r"[^\w.-]+", "_", Path(maps.name).with_suffix("").as_posix()).strip("._") or "image"
        name, number = stem, 1
        while f"{name}.png" in names:
            number += 1
            name = f"{stem}-{number}"
        names[f"{name}.png"] = None
    return list(names)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a PNG file. Raises UserError if the disk refuses."""
    try:
        write_png(path, picture)
    except OSError as error:
        raise UserError(write_error(path, error)) from None


def save_text(path: Path, text: str) -> None:
    """Write a text file; a missing folder is created. Raises UserError if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(write_error(path, error)) from None
    write_atomic(path, text)

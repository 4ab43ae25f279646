"""Self-contained HTML pages of images: thumbnails inside, light and dark, no script and no network."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from maskwise.imaging.web_page import data_address, escaped

SIDE = 160  # pixels of a thumbnail's longer side
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222228; --soft: #66666f; --line: #dedee2; }
@media (prefers-color-scheme: dark) { :root { --paper: #16161a; --ink: #e8e8ec; --soft: #9c9ca6; --line: #34343c; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 160px; } figure.marked img, figure.marked .none { outline: 3px solid #d65d0e; }
img, .none { display: block; max-width: 160px; border-radius: 3px; } img { min-width: 96px; image-rendering: auto; }
.none { width: 160px; height: 96px; line-height: 96px; text-align: center; background: var(--line); }
figcaption, p { color: var(--soft); overflow-wrap: anywhere; } figcaption { font-size: .8rem; margin-top: .3rem; }
"""


@dataclass(frozen=True)
class Figure:
    """An image with the lines below it; image: [C, H, W], None where there is none; marked: outlined."""

    image: Tensor | None
    lines: Sequence[str]
    marked: bool = False

    def html(self) -> str:
        """Return the figure as HTML."""
        caption = "<br>".join(escaped(line) for line in self.lines)
        kind = ' class="marked"' if self.marked else ""
        return f"<figure{kind}>{picture(self.image)}<figcaption>{caption}</figcaption></figure>"


def page(title: str, remarks: Iterable[str], sections: Iterable[tuple[str, Sequence[Figure]]]) -> str:
    """Return a page: a title, remarks as paragraphs, and sections of (title, figures)."""
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body><h1>{escaped(title)}</h1>")
    parts += [f"<p>{escaped(remark)}</p>" for remark in remarks]
    for name, figures in sections:
        row = "\n".join(figure.html() for figure in figures)
        parts.append(f'<section><h2>{escaped(name)}</h2><div class="row">{row}</div></section>')
    return "\n".join([*parts, "</body></html>"]) + "\n"


def picture(image: Tensor | None) -> str:
    """Return an image as an HTML element that holds its pixels."""
    if image is None:
        return '<div class="none">no image</div>'
    return f'<img alt="" src="{data_address(jpeg(image), "image/jpeg")}">'


def jpeg(image: Tensor, side: int = SIDE) -> bytes:
    """Return an image [C, H, W], uint8 or uint16, as a small JPEG file; of many channels the first."""
    if image.dtype != torch.uint8:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    pixels = image[:3] if len(image) >= 3 else image[:1]
    pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    small = Image.fromarray(pixels.contiguous().cpu().numpy()).convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()

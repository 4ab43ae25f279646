"""Sheets of titled pictures with boxes and marks, drawn by matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from maskwise.imaging.drawing import INK, PAPER

DPI = 100
MARGIN, GAP, TITLE, HEADING = 16, 10, 22, 26  # pixels
COLORS = {"LOST": (255, 122, 26), "DINO-seg": (18, 168, 216)}  # of boxes
Box = tuple[float, float, float, float]


@dataclass
class Panel:
    """A picture uint8 [h, w, 3] with its title, boxes by method (x0, y0, x1, y1) and a marked box, in its pixels."""

    title: str
    picture: np.ndarray
    boxes: Mapping[str, Box] = field(default_factory=dict)
    mark: Box | None = None


@dataclass
class Band:
    """Rows of panels of one size below a heading; a row has `columns` panels at most."""

    heading: str
    panels: Sequence[Panel]
    columns: int


def panel_sheet(bands: Sequence[Band], width: int = 1280) -> np.ndarray:
    """Draw bands below one another -> uint8 [H, W, 3].

    Panels fill the width; each band's take the aspect of its first picture.
    """
    places, height = layout(bands, width)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "text.color": rgb(INK)}):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=rgb(PAPER))
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # one: axes cost more than pictures
        axes.set_axis_off()
        for what, (left, top, wide, tall) in places:
            if isinstance(what, str):
                axes.text(left, top, what, va="top", size=12, weight="bold")
            else:
                draw_panel(axes, what, (left, top, wide, tall))
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


def layout(bands: Sequence[Band], width: int) -> tuple[list, int]:
    """Return the places of headings and panels, (what, (left, top, width, height)) in pixels, and the height."""
    places, y = [], MARGIN
    for band in bands:
        if band.heading:
            places.append((band.heading, (MARGIN, y, 0, 0)))
            y += HEADING
        wide = (width - 2 * MARGIN - GAP * (band.columns - 1)) // band.columns
        first = band.panels[0].picture
        tall = max(1, round(wide * first.shape[0] / first.shape[1]))
        for i, panel in enumerate(band.panels):
            row, column = divmod(i, band.columns)
            places.append((panel, (MARGIN + column * (wide + GAP), y + TITLE + row * (TITLE + tall + GAP), wide, tall)))
        y += -(-len(band.panels) // band.columns) * (TITLE + tall + GAP) + GAP
    return places, y + MARGIN - GAP


def draw_panel(axes, panel: Panel, place: tuple[int, int, int, int]) -> None:
    """Draw one panel at a place (left, top, width, height) of axes in pixels."""
    from matplotlib.patches import Rectangle

    left, top, wide, tall = place
    scale = np.array([wide, tall] * 2) / np.array(panel.picture.shape[1::-1] * 2)
    extent = (left, left + wide, top + tall, top)
    axes.imshow(panel.picture, extent=extent, aspect="auto", interpolation="nearest")
    axes.text(left, top - 5, panel.title, size=9, va="bottom")
    marked = [(box, rgb(COLORS[name]), 2.2) for name, box in panel.boxes.items()]
    marked += [(panel.mark, rgb((255, 255, 255)), 1.2)] if panel.mark is not None else []
    for box, color, line in marked:
        x0, y0, x1, y1 = np.array(box) * scale
        for edge, thick in (("black", line + 1.4), (color, line)):
            corner = (left + x0, top + y0)
            axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=thick))
    for i, name in enumerate(panel.boxes):
        label = {"facecolor": rgb(COLORS[name]), "edgecolor": "none", "pad": 2}
        axes.text(left + 6 + 50 * i, top + tall - 8, name, size=8, color="white", weight="bold", bbox=label)


def rgb(color: Sequence[int]) -> tuple[float, ...]:
    """Return a color of bytes as matplotlib takes it."""
    return tuple(float(value) / 255 for value in color)

"""Charts drawn by matplotlib without its global state; opaque uint8 arrays [H, W, 3].

matplotlib is imported when the first chart is drawn, so that training and the command line start without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from maskwise.imaging.drawing import INK, PAPER

PALETTE = ((31, 98, 176), (214, 93, 14), (38, 133, 78), (160, 50, 120), (120, 92, 60), (0, 140, 150), (190, 160, 0))
GRID = (222, 222, 226)
RED = (205, 25, 35)
DPI = 150
LEGEND_SHARE = 0.85  # of the width that a legend above the axes may take; wider ones would narrow the axes
LEGEND_ENTRIES = 16  # more names than that do not fit beside a scatter chart
SIZE = (540, 960)  # pixels, height and width


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
    size: tuple[int, int] = SIZE,
    x_name: str = "",
    y_name: str = "",
) -> np.ndarray:
    """Draw named curves of points [(x, y), ...]; points that are not finite are left out -> [H, W, 3]."""
    with _canvas(size) as (figure, pixels):
        axes = figure.add_subplot(xlabel=x_name, ylabel=y_name)
        for number, (name, points) in enumerate(series.items()):
            finite = sorted((float(x), float(y)) for x, y in points if np.isfinite(x) and np.isfinite(y))
            marker = "o" if len(finite) < 2 else None
            color = _rgb(PALETTE[number % len(PALETTE)])
            axes.plot([x for x, _ in finite], [y for _, y in finite], color=color, label=name, marker=marker)
        axes.grid(True)
        figure.suptitle(title, x=0.02, ha="left")
        if series:
            _legend_above(axes, len(series))
        return pixels()


def bar_chart(
    values: ArrayLike, names: Sequence[str], title: str = "", top: float = 100.0, limit: int = 40
) -> np.ndarray:
    """Draw horizontal bars from 0 to `top`, the largest first; of more than `limit`, the best and worst halves."""
    values = np.nan_to_num(np.asarray(values, dtype=float))
    order = np.argsort(-values, kind="stable")
    cut = len(order) > limit
    if cut:
        order = np.concatenate([order[: limit // 2], order[len(order) - (limit - limit // 2) :]])
    with _canvas((150 + 36 * max(1, len(order)), SIZE[1])) as (figure, pixels):
        axes = figure.add_subplot(xlim=(0, top))
        places = np.arange(len(order))
        bars = axes.barh(places, values[order].clip(0, top), height=0.7, color=_rgb(PALETTE[0]))
        axes.bar_label(bars, [f"{value:.1f}" for value in values[order]], padding=4)
        axes.set_yticks(places, [_short(names[i]) for i in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        if cut:
            axes.axhline(limit // 2 - 0.5, color=_rgb(INK), linestyle="--", linewidth=1)
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        figure.suptitle(title, x=0.02, ha="left")
        return pixels()


def interval_chart(samples: Mapping[str, Sequence[float]], title: str = "") -> np.ndarray:
    """Draw samples per name as dots with span and mean, best mean first -> [H, W, 3]."""
    rows = sorted(samples.items(), key=lambda row: -float(np.mean(row[1])))
    with _canvas((150 + 40 * len(rows), SIZE[1])) as (figure, pixels):
        axes = figure.add_subplot()
        for place, (_, values) in enumerate(rows):
            mean = float(np.mean(values))
            axes.hlines(place, min(values), max(values), color=_rgb(GRID), linewidth=4)
            axes.plot(values, [place] * len(values), "o", color=_rgb(PALETTE[0]), markersize=5)
            axes.vlines(mean, place - 0.3, place + 0.3, color=_rgb(PALETTE[1]), linewidth=3)
            axes.text(1.02, place, f"{mean:.1f}", transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.05)
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        figure.suptitle(title, x=0.02, ha="left")
        return pixels()


def confusion_chart(table: ArrayLike, names: Sequence[str], title: str = "", size: int = 960) -> np.ndarray:
    """Draw a confusion matrix [C, C], rows (true classes) scaled to their sum, columns the predicted classes."""
    table = np.asarray(table, dtype=float)
    share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    count, top = len(table), float(share.max(initial=0)) or 100.0
    with _canvas((size, size)) as (figure, pixels):
        axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=top, interpolation="nearest", aspect="auto")
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, label="share of the true class (%)")
        if count <= 30:
            axes.set_yticks(range(count), [_short(name, 16) for name in names])
            axes.set_xticks(range(count), [_short(name, 16) for name in names], rotation=90)
        for i in range(count if count <= 12 else 0):
            ink = PAPER if share[i, i] > 0.6 * top else INK
            axes.text(i, i, f"{share[i, i]:.0f}", ha="center", va="center", color=_rgb(ink))
        figure.suptitle(title, x=0.02, ha="left")
        return pixels()


def scatter_chart(
    points: ArrayLike,
    labels: ArrayLike,
    names: Sequence[str],
    title: str = "",
    size: tuple[int, int] = (720, 960),
    triangles: Mapping[str, ArrayLike] = {},
) -> np.ndarray:
    """Draw points [n, 2] in the plane, one color per label; the legend lists the first names -> [H, W, 3].

    triangles: name -> points [k, 2] drawn above the others, the first name's in ink, the second's in red.
    """
    points, labels = np.asarray(points, dtype=float).reshape(-1, 2), np.asarray(labels)
    colors = distinct_colors(len(names))
    with _canvas(size) as (figure, pixels):
        axes = figure.add_subplot(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        area = 30 if len(points) <= 1000 else 10
        for number, color in enumerate(colors):
            chosen = points[labels == number]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=area, color=_rgb(color), linewidths=0)
        shown = [_short(name, 16) for name in names[:LEGEND_ENTRIES]]
        handles = [axes.scatter([], [], s=60, color=_rgb(color), linewidths=0) for color in colors[: len(shown)]]
        if len(names) > len(shown):
            handles.append(axes.scatter([], [], s=0))
            shown.append(f"and {len(names) - len(handles) + 1} more")
        for (name, marks), color in zip(triangles.items(), (INK, RED)):
            marks = np.asarray(marks, dtype=float).reshape(-1, 2)
            handles.append(axes.scatter(marks[:, 0], marks[:, 1], s=130, color=_rgb(color), marker="^", edgecolors="w"))
            shown.append(name)
        figure.legend(handles, shown, loc="outside right upper")
        figure.suptitle(title, x=0.02, ha="left")
        return pixels()


def distinct_colors(count: int) -> np.ndarray:
    """Return distinct colors, uint8 [count, 3]: the palette if it suffices, else hues around the circle."""
    if count <= len(PALETTE):
        return np.array(PALETTE, dtype=np.uint8)[:count]
    from matplotlib import colors

    hue, value = np.arange(count) / count, np.where(np.arange(count) % 2, 0.95, 0.65)
    return np.rint(255 * colors.hsv_to_rgb(np.stack([hue, np.full(count, 0.85), value], axis=1))).astype(np.uint8)


@contextlib.contextmanager
def _canvas(size: tuple[int, int]) -> Iterator[tuple]:
    """Provide a figure of size (H, W) pixels and a function that renders it to uint8 [H, W, 3]."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.size": 12,
        "axes.titlesize": 13,
        "figure.titlesize": 13,
        "figure.titleweight": "bold",
        "text.color": _rgb(INK),
        "axes.labelcolor": _rgb(INK),
        "axes.edgecolor": _rgb(INK),
        "xtick.color": _rgb(INK),
        "ytick.color": _rgb(INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 1.0,
        "grid.color": _rgb(GRID),
        "lines.linewidth": 2.5,
        "legend.frameon": False,
        "legend.fontsize": 11,
    }
    height, width = size
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor=_rgb(PAPER))
        canvas = FigureCanvasAgg(figure)

        def pixels() -> np.ndarray:
            canvas.draw()
            return np.array(canvas.buffer_rgba())[..., :3]

        yield figure, pixels


def _legend_above(axes, count: int) -> None:
    """Add a legend above the axes in as many columns, at most four, as the figure's width allows."""
    room = LEGEND_SHARE * axes.figure.bbox.width
    for columns in range(min(4, count), 0, -1):
        legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns)
        if legend.get_window_extent(axes.figure.canvas.get_renderer()).width <= room:
            return


def _rgb(color: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(value) / 255 for value in color)


def _short(name: object, length: int = 24) -> str:
    text = str(name)
    return text if len(text) <= length else f"{text[: length - 1]}…"

"""Charts of labelled numbers: bars, ranges, a matrix, points on a plane; uint8 arrays [H, W, 3], made with NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from maskwise.functional.draw import INK, PALETTE, PAPER, RULE, heat, write

LETTER = 8  # pixels of one letter of scale 2


def bars(values: ArrayLike, names: Sequence[str], title: str = "", top: float = 100.0, rows: int = 40) -> np.ndarray:
    """Horizontal bars from 0 to `top`, one a name, largest first; of more than `rows` the best and the worst halves are shown -> [H, W, 3]."""
    values = np.nan_to_num(np.asarray(values, dtype=float))
    order = np.argsort(-values, kind="stable")
    shown = order if len(order) <= rows else np.concatenate([order[: rows // 2], order[len(order) - (rows - rows // 2) :]])
    left, wide, line = 16 + LETTER * min(24, max([len(str(names[i])) for i in shown], default=0)), 360, 16
    canvas = np.full((44 + line * len(shown) + 28, left + wide + 80, 3), PAPER, dtype=np.uint8)
    write(canvas, title, 8, 12)
    for tick in range(5):
        at = left + wide * tick // 4
        canvas[32 : 36 + line * len(shown), at] = RULE
        write(canvas, f"{top * tick / 4:g}", 42 + line * len(shown), at - 8)
    for row, i in enumerate(shown):
        y = 36 + row * line
        if len(order) > rows and row == rows // 2:
            canvas[y - 2, 12 : left + wide] = INK
        write(canvas, str(names[i])[:24], y, 8)
        canvas[y : y + 11, left : left + max(1, round(wide * min(1.0, max(0.0, values[i] / top))))] = PALETTE[0]
        write(canvas, f"{values[i]:.1f}", y, left + wide + 12)
    return canvas


def ranges(samples: Mapping[str, Sequence[float]], title: str = "", wide: int = 420) -> np.ndarray:
    """A line a name, best mean first: its samples as dots, the span between them, the mean as a bar and in figures -> [H, W, 3]."""
    rows = sorted(samples.items(), key=lambda row: -float(np.mean(row[1])))
    every = np.concatenate([np.asarray(values, dtype=float) for _, values in rows])
    low, high = float(every.min()), float(every.max())
    edge = max(0.05 * (high - low), 0.5)
    low, high = low - edge, high + edge
    left, line = 16 + LETTER * max(len(name) for name, _ in rows), 18
    canvas = np.full((44 + line * len(rows) + 28, left + wide + 88, 3), PAPER, dtype=np.uint8)
    write(canvas, title, 8, 12)

    def place(value: float) -> int:
        return left + round(wide * (value - low) / (high - low))

    for tick in np.linspace(low, high, 5):
        canvas[32 : 36 + line * len(rows), place(tick)] = RULE
        write(canvas, f"{tick:.1f}", 42 + line * len(rows), place(tick) - 12)
    for row, (name, values) in enumerate(rows):
        y, mean = 42 + row * line, float(np.mean(values))
        write(canvas, name, y - 4, 8)
        canvas[y - 1 : y + 2, place(min(values)) : place(max(values)) + 1] = RULE
        for value in values:
            canvas[y - 2 : y + 3, place(value) - 2 : place(value) + 3] = PALETTE[0]
        canvas[y - 6 : y + 7, place(mean) - 1 : place(mean) + 1] = PALETTE[1]
        write(canvas, f"{mean:.1f}", y - 4, left + wide + 20)
    return canvas


def matrix(table: ArrayLike, names: Sequence[str], title: str = "", size: int = 480) -> np.ndarray:
    """A square table as shades, rows scaled to their sum; true classes downwards, predicted ones to the right -> [H, W, 3]."""
    table = np.asarray(table, dtype=float)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    count = len(table)
    cell = max(1, size // max(1, count))
    few = count <= 30
    left = 24 + (LETTER * min(16, max(len(str(name)) for name in names)) if few else 0)
    side = cell * count
    canvas = np.full((side + 96, left + side + 24, 3), PAPER, dtype=np.uint8)
    write(canvas, title, 8, 12)
    write(canvas, "predicted to the right, true class downwards", 26, 12)
    picture = heat(np.vstack([share, np.linspace(0, 1, count)[None]]), None)[:-1]  # the last row fixes the scale to 0..1
    canvas[48 : 48 + side, left : left + side] = np.kron(picture, np.ones((cell, cell, 1), dtype=np.uint8))
    for i, name in enumerate(names if few else ()):
        write(canvas, str(name)[:16], 48 + i * cell + max(0, cell // 2 - 5), 8)
        write(canvas, str(i), 54 + side, left + i * cell + max(0, cell // 2 - 4 * len(str(i))))
        if cell >= 34:
            ink = INK if share[i, i] > 0.6 else PAPER
            write(canvas, f"{100 * share[i, i]:.0f}", 48 + i * cell + cell // 2 - 5, left + i * cell + cell // 2 - 8, ink)
    write(canvas, "dark 0, bright 100 per cent of a row" + ("" if few else f"; {count} classes"), side + 76, 12)
    return canvas


def scatter(points: ArrayLike, labels: ArrayLike, names: Sequence[str], title: str = "", size: int = 560) -> np.ndarray:
    """Points [n, 2] on a plane, a colour a label; with more labels than colours each keeps a shade of its own -> [H, W, 3]."""
    points, labels = np.asarray(points, dtype=float), np.asarray(labels)
    low, high = points.min(axis=0), points.max(axis=0)
    place = np.rint((points - low) / np.maximum(high - low, 1e-12) * (size - 17)).astype(int) + 8
    colours = shades(len(names))
    canvas = np.full((size + 44, size + 24 + LETTER * 18, 3), PAPER, dtype=np.uint8)
    write(canvas, title, 8, 12)
    wide = 2 if len(points) <= 1000 else 1
    canvas[[32, 32 + size - 1], 12 : 12 + size], canvas[32 : 32 + size, [12, 12 + size - 1]] = RULE, RULE
    for (x, y), label in zip(place, labels):
        top, side = 32 + size - 1 - y, 12 + x
        canvas[top - wide : top + wide + 1, side - wide : side + wide + 1] = colours[label]
    for row, name in enumerate(names[: (size - 16) // 16]):
        canvas[38 + row * 16 : 48 + row * 16, size + 22 : size + 32] = colours[row]
        write(canvas, str(name)[:14], 38 + row * 16, size + 38)
    return canvas


def framed(picture: ArrayLike, color: Sequence[int], width: int = 6) -> np.ndarray:
    """A picture [H, W, 3] with a border of its own size's share: right or wrong at a glance."""
    picture = np.array(picture)
    width = max(1, round(width * min(picture.shape[:2]) / 128))
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        picture[edge] = color
    return picture


def shades(count: int) -> np.ndarray:
    """Colours that can be told apart, uint8 [count, 3]: the palette, then hues around the circle."""
    if count <= len(PALETTE):
        return np.array(PALETTE, dtype=np.uint8)[:count]
    turn = np.arange(count) / count * 6
    base = np.stack([np.clip(np.abs((turn + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)], axis=1)
    return np.rint((0.15 + 0.7 * base) * np.where(np.arange(count) % 2, 255, 175)[:, None]).astype(np.uint8)

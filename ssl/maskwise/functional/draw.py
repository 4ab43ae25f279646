"""Pictures of what the network does: uint8 arrays [H, W, 3], made with NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

INK, PAPER, RULE = (34, 34, 40), (255, 255, 255), (222, 222, 226)
PALETTE = ((31, 98, 176), (214, 93, 14), (38, 133, 78), (160, 50, 120), (120, 92, 60), (0, 140, 150), (190, 160, 0))

# Dark to bright, so that the map also reads in grey.
_HEAT = np.array([(8, 10, 46), (62, 20, 110), (148, 36, 110), (222, 74, 66), (250, 152, 40), (252, 246, 170)], dtype=float)

# 3x5 glyphs: five octal digits, one per row, its bits the pixels of the row.
_GLYPHS = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:-+=/()%_*#'<>?![]|@",
        "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717 "
        "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 65644 25563 "
        "65655 34216 72222 55557 55552 55775 55255 55222 71247 "
        "00002 00024 02020 00700 02720 07070 11244 12221 42224 51245 00007 05250 57575 22000 12421 42124 71202 22202 "
        "32223 31113 22222 75547".split(),
    )
)


def heat(values: ArrayLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """A map [h, w] as colours, its minimum dark and its maximum bright, enlarged to size (H, W) -> [H, W, 3]."""
    values = np.asarray(values, dtype=float)
    finite = np.where(np.isfinite(values), values, np.nan)
    if not np.isfinite(finite).any():
        finite = np.zeros_like(finite)
    low, high = np.nanmin(finite), np.nanmax(finite)
    place = np.nan_to_num((finite - low) / (high - low) if high > low else finite * 0.0) * (len(_HEAT) - 1)
    below = np.minimum(place.astype(int), len(_HEAT) - 2)
    rest = (place - below)[..., None]
    colours = _bytes(_HEAT[below] * (1 - rest) + _HEAT[below + 1] * rest)
    return colours if size is None else enlarge(colours, size)


def overlay_heat(image: ArrayLike, values: ArrayLike, alpha: float = 0.6) -> np.ndarray:
    """A map [h, w] laid over an image [H, W, 3] -> [H, W, 3]."""
    image = np.asarray(image)
    return _bytes((1 - alpha) * image + alpha * heat(values, image.shape[:2]))


def overlay_mask(image: ArrayLike, mask: ArrayLike, color: Sequence[int] = (118, 118, 124), alpha: float = 0.92) -> np.ndarray:
    """An image [H, W, 3] with its hidden patches, bool [h, w], covered -> [H, W, 3]."""
    image = np.asarray(image)
    cover = enlarge(np.asarray(mask, dtype=bool), image.shape[:2])[..., None]
    return _bytes(np.where(cover, (1 - alpha) * image + alpha * np.array(color), image))


def enlarge(picture: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize of [h, w] or [h, w, 3] to size (H, W): a patch stays a block of one colour."""
    picture = np.asarray(picture)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, picture.shape[:2]))
    return picture[rows][:, columns]


def text(string: str, scale: int = 2) -> np.ndarray:
    """Letters as bool [5 * scale, width]; lower case is drawn as upper case, what has no glyph as a blank."""
    columns = [np.zeros((5, 0), dtype=bool)]
    for character in string.upper():
        rows = _GLYPHS.get(character, "00000")
        columns += [np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in rows], dtype=bool), np.zeros((5, 1), dtype=bool)]
    return np.kron(np.hstack(columns), np.ones((scale, scale), dtype=bool))


def write(canvas: np.ndarray, string: str, top: int, left: int, color: Sequence[int] = INK, scale: int = 2) -> None:
    """Write a line onto a canvas [H, W, 3] in place; what does not fit is cut off."""
    letters = text(string, scale)[: max(0, canvas.shape[0] - top), : max(0, canvas.shape[1] - left)]
    canvas[top : top + letters.shape[0], left : left + letters.shape[1]][letters] = color


def sheet(
    rows: Sequence[Sequence[ArrayLike]], titles: Sequence[str] = (), labels: Sequence[str] = (), tile: int | None = None, gap: int = 4
) -> np.ndarray:
    """Rows of pictures [H, W, 3] on one sheet, with a title above each column and a label under each row -> [H, W, 3].

    Every picture is brought to tile x tile pixels; by default to the largest side, but at least 96.
    """
    rows = [[np.asarray(picture) for picture in row] for row in rows]
    tile = tile or max([96, *(max(picture.shape[:2]) for row in rows for picture in row)])
    wide, top, line = max((len(row) for row in rows), default=0), 14 if titles else 0, 14 if labels else 0
    canvas = np.full((gap + top + len(rows) * (tile + line + gap), gap + wide * (tile + gap), 3), PAPER, dtype=np.uint8)
    fits = tile // 8  # letters of scale 2 are 8 pixels wide
    for column, title in enumerate(titles):
        write(canvas, title[:fits], gap, gap + column * (tile + gap))
    for index, row in enumerate(rows):
        y = gap + top + index * (tile + line + gap)
        for column, picture in enumerate(row):
            x = gap + column * (tile + gap)
            canvas[y : y + tile, x : x + tile] = enlarge(picture, (tile, tile))
        if index < len(labels):
            write(canvas, labels[index], y + tile + 2, gap)
    return canvas


def chart(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str = "", size: tuple[int, int] = (360, 640), x_name: str = "", y_name: str = ""
) -> np.ndarray:
    """A line chart of named points [(x, y), ...]; points that are not finite are left out -> [H, W, 3]."""
    height, width = size
    canvas = np.full((height, width, 3), PAPER, dtype=np.uint8)
    curves = {name: [(float(x), float(y)) for x, y in points if np.isfinite(x) and np.isfinite(y)] for name, points in series.items()}
    every = [point for points in curves.values() for point in points] or [(0.0, 0.0)]
    x_ticks, y_ticks = _ticks([x for x, _ in every]), _ticks([y for _, y in every])
    left, right, top, bottom = 16 + 8 * max(len(_number(t)) for t in y_ticks), width - 24, 44, height - 36

    def across(x):
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

    def down(y):
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    for tick in y_ticks:
        canvas[round(down(tick)), left : right + 1] = RULE
        write(canvas, _number(tick), round(down(tick)) - 5, left - 8 - 8 * len(_number(tick)))
    for tick in x_ticks:
        canvas[top : bottom + 1, round(across(tick))] = RULE
        write(canvas, _number(tick), bottom + 8, max(0, round(across(tick)) - 4 * len(_number(tick))))
    canvas[top : bottom + 1, left], canvas[bottom, left : right + 1] = INK, INK
    write(canvas, title, 8, left)
    write(canvas, x_name, height - 13, right - 8 * len(x_name))
    write(canvas, y_name, 28, 8)
    place = left + 8 * (len(y_name) + 2 if 8 * len(y_name) > left - 16 else 1)
    for (name, points), color in zip(curves.items(), PALETTE * (1 + len(curves) // len(PALETTE))):
        canvas[31:35, place : place + 14] = color
        write(canvas, name, 28, place + 18, color)
        place += 18 + 8 * len(name) + 20
        points = sorted(points)
        for start, end in zip(points, points[1:] or points):
            _line(canvas, (across(start[0]), down(start[1])), (across(end[0]), down(end[1])), color)
    return canvas


def write_png(path: str | Path, picture: ArrayLike) -> None:
    """Save a picture, uint8 [H, W, 3], as PNG; the folder is made if it is missing."""
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture)).save(path, format="PNG")


def _line(canvas: np.ndarray, start: tuple[float, float], end: tuple[float, float], color: Sequence[int]) -> None:
    """A line two pixels thick between points (x, y) of the canvas."""
    steps = int(max(abs(end[0] - start[0]), abs(end[1] - start[1]))) * 2 + 1
    x = np.rint(np.linspace(start[0], end[0], steps + 1)).astype(int)
    y = np.rint(np.linspace(start[1], end[1], steps + 1)).astype(int)
    for row, column in ((y, x), (y + 1, x), (y, x + 1), (y + 1, x + 1)):
        canvas[np.clip(row, 0, canvas.shape[0] - 1), np.clip(column, 0, canvas.shape[1] - 1)] = color


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers that span the values."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(np.log(m * power / rough)))
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value + 0.0:.4g}".replace("e+0", "e").replace("e-0", "e-")


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)

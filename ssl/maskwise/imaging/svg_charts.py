"""Line charts as SVG by matplotlib, whose colors are variables of the page: --c0, --c1 ..., --ink and --line."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 400, 220  # units of the view box; one is about a CSS pixel
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 26
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten
COLORS = 8  # --c0 to --c7; further curves repeat them with other dashes
MOST_POINTS = 300  # of a curve; more are thinned to the extremes of equal stretches
SMOOTHED = 120  # points from which a running mean is drawn over the curve
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
WIDE_RANGE = 100
LEVEL_DASH = (0, (5, 3))
INK, LINE, ALARM = "#02ff00", "#02ff01", "#02ff02"  # places of the variables --ink, --line and --alarm


@dataclass(frozen=True)
class LineChart:
    """Curves in one frame: name -> points, and values of horizontal dashed lines.

    marks: places of vertical lines, with texts; span: of the horizontal axis, by default that of the points; log: draw
    values by logarithm if all are positive and the largest is WIDE_RANGE times the smallest.
    """

    series: Mapping[str, Points]
    levels: Mapping[str, float] = field(default_factory=dict)
    marks: Sequence[tuple[float, str]] = ()
    span: tuple[float, float] | None = None
    log: bool = False


def line_svg(chart: LineChart) -> tuple[str, dict]:
    """Draw a chart -> (SVG element, what a pointer needs to find values in it).

    The latter: `box` of the frame in units of the view box (left, top, right, bottom), `x` and `y` its ranges, `log`,
    `series` of {name, color, points}, `levels` of {name, color, value} and `marks`.
    """
    series = {name: thinned(points) for name, points in chart.series.items()}
    lines = [line for name, points in series.items() if len(line := np.array(points, dtype=float).reshape(-1, 2))]
    values = np.concatenate([*(line[:, 1] for line in lines), [*chart.levels.values()], []])
    positive = chart.log and len(values) > 0 and values.min() > 0
    log = bool(positive and values.max() >= WIDE_RANGE * values.min())
    low, high = margins(values, log)
    left, right = chart.span or spread([line[:, 0] for line in lines])
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "maskwise", "font.size": 11, "lines.linewidth": 1.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        FigureCanvasSVG(figure)
        frame = (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        axes = figure.add_axes(frame, xlim=(left, right), ylim=(low, high), yscale="log" if log else "linear")
        style_axes(axes, log)
        for place, _ in chart.marks:
            axes.axvline(place, color=ALARM, linewidth=1.2, linestyle=(0, (2, 2)))
        for number, points in enumerate(series.values()):
            draw_curve(axes, points, number)
        for number, value in enumerate(chart.levels.values(), start=len(series)):
            axes.axhline(value, color=placeholder(number), linestyle=LEVEL_DASH, linewidth=1.3)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    data = {
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "x": [left, right],
        "y": [low, high],
        "log": log,
        "series": [
            {"name": name, "color": number % COLORS, "points": [[x, significant(y)] for x, y in points]}
            for number, (name, points) in enumerate(series.items())
        ],
        "levels": [
            {"name": name, "color": number % COLORS, "value": significant(value)}
            for number, (name, value) in enumerate(chart.levels.items(), start=len(series))
        ],
        "marks": [[place, text] for place, text in chart.marks],
    }
    return page_svg(file.getvalue()), data


def draw_curve(axes, points: Points, number: int) -> None:
    """Draw one curve: with dots if it is short, with a running mean above it if it is long."""
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    color, dash = placeholder(number), DASHES[number // COLORS % len(DASHES)]
    if len(x) > SMOOTHED:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(x, smoothed(y), color=color, linestyle=dash)
    else:
        dots = {"marker": "o", "markersize": 3.6, "clip_on": False} if len(x) <= 20 else {}
        axes.plot(x, y, color=color, linestyle=dash, markeredgewidth=0, **dots)


def style_axes(axes, log: bool) -> None:
    """Set grid, spines and tick labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    axes.yaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        ticks = [tick for tick in axis.get_ticklocs() if math.isfinite(tick)]
        step = min((abs(b - a) for a, b in zip(ticks, ticks[1:]) if a != b), default=1.0)
        axis.set_major_formatter(FuncFormatter(lambda value, _, step=step: tick_text(value, step, log)))
    axes.tick_params(length=0, pad=5, which="both", colors=INK)
    axes.grid(True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def tick_text(value: float, step: float, log: bool = False) -> str:
    """Return a short number for an axis whose ticks are `step` apart: 1500 is 1.5k, 0.0005 is 5e-4."""
    size = abs(value)
    if value == 0 or log:
        return short_exponent(f"{value:.3g}" if 1e-2 <= size < 1e4 or value == 0 else f"{value:.0e}")
    if size < 1e-3 or size >= 1e12:
        return short_exponent(f"{value:.{digits(step, size)}e}")
    scale, unit = next(pair for pair in UNITS if size >= pair[0] or not pair[1])
    return f"{value / scale:.{max(0, min(6, math.ceil(-math.log10(step / scale) - 1e-9)))}f}{unit}"


def short_exponent(text: str) -> str:
    """Return a number such as 1e-03 as 1e-3, 1e+06 as 1e6."""
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), text)


def digits(step: float, size: float) -> int:
    """Return how many decimals of a mantissa tell values of a size apart that differ by `step`."""
    return max(0, min(3, math.floor(math.log10(size)) - math.floor(math.log10(step) + 1e-9)))


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Sort points; of more than `most`, keep both ends and the extremes of equal stretches."""
    points = sorted((float(x), float(y)) for x, y in points)
    if len(points) <= most:
        return points
    keep = {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), most // 2):
        values = [points[i][1] for i in part]
        keep |= {int(part[int(np.argmin(values))]), int(part[int(np.argmax(values))])}
    return [points[i] for i in sorted(keep)]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a twentieth of the values; at the ends, of those that there are."""
    width = max(3, len(values) // 20) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def margins(values: np.ndarray, log: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds these values with a margin."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.3, high * 1.3
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if low == 0 else low - margin), high + margin


def spread(places: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the first and last place of all, apart from each other."""
    joined = np.concatenate([*places, []])
    low, high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def placeholder(number: int) -> str:
    """Return the color that stands for the variable of a curve."""
    return f"#01ff{number % COLORS:02x}"


def significant(value: float) -> float:
    """Return a value with five significant digits."""
    return float(f"{value:.5g}")


def page_svg(text: str) -> str:
    """Return matplotlib's SVG file as an element of a page: without prolog, names, fonts and fixed size."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"|<g/>|<defs>\s*</defs>', "", text)
    path = lambda match: f' d="{re.sub(DECIMALS, one_decimal, match[1]).strip()}"'.replace("\n", "")  # noqa: E731
    text = re.sub(r' d="([^"]*)"', path, text)
    text = re.sub(r"#01ff0([0-9a-f])", lambda match: f"var(--c{int(match[1], 16)})", text)
    for color, name in ((INK, "soft"), (LINE, "line"), (ALARM, "alarm")):
        text = text.replace(color, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


DECIMALS = r"-?\d+\.\d+"


def one_decimal(match: re.Match) -> str:
    """Return a matched number with one decimal, without a decimal of zero."""
    return f"{float(match[0]):.1f}".removesuffix(".0")

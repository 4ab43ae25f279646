"""Charts as SVG: the drawn paths lead back to the values; thinning, means and tick labels by hand."""

import math
import re

import numpy as np
import pytest

from maskwise.imaging.svg_charts import LineChart, line_svg, page_svg, smoothed, thinned, tick_text


def values_of(path, data):
    """Points of an SVG path as values, by the frame and ranges that the pointer uses."""
    left, top, right, bottom = data["box"]
    (first, last), ends = data["x"], [math.log(y) if data["log"] else y for y in data["y"]]
    points = []
    for across, down in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path):
        x = first + (float(across) - left) / (right - left) * (last - first)
        y = ends[0] + (bottom - float(down)) / (bottom - top) * (ends[1] - ends[0])
        points.append((x, math.exp(y) if data["log"] else y))
    return points


def paths(svg, color):
    return re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--{color}\)', svg)


@pytest.mark.parametrize("log", [False, True])
def test_paths_and_pointer_share_one_frame(log):
    rng = np.random.default_rng(0)
    first = [(x, float(y)) for x, y in zip(range(0, 80, 3), np.exp(6 * rng.random(27)))]
    second = [(x, 1.0 + x) for x in range(10, 80, 5)]
    chart = LineChart({"a": first, "b": second}, {"level": 30.0}, [(12, "alarm")], (0, 100), log)
    svg, data = line_svg(chart)
    assert data["log"] == (log and max(y for _, y in first) >= 100 * min(y for _, y in [*first, *second]))
    for number, points in enumerate((first, second)):
        [path] = paths(svg, f"c{number}")
        height = (data["y"][1] - data["y"][0]) / 186 / 10
        drawn = values_of(path, data)
        assert [x for x, _ in drawn] == pytest.approx([x for x, _ in points], abs=0.03)
        for (_, y), (_, wanted) in zip(drawn, points):
            assert y == pytest.approx(wanted, abs=height, rel=0.01 if data["log"] else 1e-9)
        assert data["series"][number]["points"] == [[x, pytest.approx(y, rel=1e-4)] for x, y in points]
    assert {round(y, 0) for _, y in values_of(paths(svg, "c2")[0], data)} == {30.0}
    assert {round(x, 0) for x, _ in values_of(paths(svg, "alarm")[0], data)} == {12.0}


def test_a_wide_range_is_drawn_by_logarithm_and_no_other():
    wide = [(0, 1e-3), (1, 1.0), (2, 1e3)]
    for points, log in ((wide, True), ([(0, 1.0), (1, 50.0)], False), ([(0, 0.0), (1, 1e4)], False)):
        assert line_svg(LineChart({"a": points}, log=True))[1]["log"] == log
    assert not line_svg(LineChart({"a": wide}))[1]["log"]
    svg, data = line_svg(LineChart({"a": wide}, log=True))
    assert [y for _, y in values_of(paths(svg, "c0")[0], data)] == pytest.approx([1e-3, 1.0, 1e3], rel=0.02)


def test_extremes_are_drawn():
    assert "var(--c0)" in line_svg(LineChart({"a": [(1, 1)]}))[0]
    for points in ([(0, 0), (1, 0)], [(5, -3), (6, -3)], [(0, 1e-12), (1e6, 1.1e-12)], [(0, 1e30), (1, -1e30)]):
        svg, data = line_svg(LineChart({"a": points}, log=True))
        assert len(values_of(paths(svg, "c0")[0], data)) == len(points)
        assert data["y"][0] < min(y for _, y in points) or data["y"][0] == 0
    assert "var(--line)" in line_svg(LineChart({}))[0]


def test_thinning_keeps_ends_and_extremes():
    rng = np.random.default_rng(1)
    points = list(enumerate(rng.random(5000)))
    points[1234], points[4321] = (1234, 9.0), (4321, -9.0)
    kept = thinned(list(reversed(points)))
    assert len(kept) <= 302 and kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(kept)
    for start in range(0, 5000, 100):  # no stretch is left without points
        assert any(start <= x < start + 100 for x, _ in kept)
    assert thinned([(2, 1.0), (1, 0.0)]) == [(1, 0.0), (2, 1.0)]


def test_running_mean_by_a_loop():
    values = np.random.default_rng(2).random(200)
    half = 11 // 2
    wanted = [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(200)]
    assert smoothed(values) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "value, step, text",
    [
        (0, 5, "0"),
        (30, 10, "30"),
        (0.25, 0.05, "0.25"),
        (0.3, 0.1, "0.3"),
        (1500, 500, "1.5k"),
        (20000, 20000, "20k"),
        (2e6, 5e5, "2.0M"),
        (5e-4, 1e-4, "5e-4"),
        (0.00015, 5e-5, "1.5e-4"),
        (-0.5, 0.5, "-0.5"),
    ],
)
def test_tick_texts(value, step, text):
    assert tick_text(value, step) == text


def test_svg_has_no_fonts_names_or_fixed_colors():
    svg, _ = line_svg(LineChart({"a": [(i, i % 7) for i in range(400)]}))
    assert svg.startswith('<svg viewBox="0 0 400 220"') and svg.endswith("</svg>")
    assert not re.search(r"font-family|DejaVu|<g id|<style|<metadata|#0[12]ff", svg)
    assert len(paths(svg, "c0")) == 2  # the curve, and its running mean
    assert page_svg('<?xml?><svg width="4pt"><g id="a"></g></svg>').startswith("<svg viewBox")

import numpy as np
import pytest

from maskwise.imaging import charts
from maskwise.imaging.charts import PALETTE


def painted(picture, color):
    return (picture == np.array(color)).all(axis=-1)


def bar_lengths(picture, color=PALETTE[0]):
    """Length in pixels of each horizontal run of bars, from the top."""
    lengths = painted(picture, color).sum(axis=1)
    starts = np.flatnonzero(np.diff((lengths > 2).astype(int), prepend=0) == 1)
    return [int(np.median(lengths[start : start + 8])) for start in starts]


def opaque_white_with_ink(picture):
    return (
        picture.dtype == np.uint8
        and picture.shape[2] == 3
        and (picture[[0, -1]] == 255).all()
        and (picture[:, [0, -1]] == 255).all()
        and (picture.astype(int).sum(axis=-1) < 200).sum() > 100
    )


def test_bars_are_proportional_to_their_values_and_sorted():
    picture = charts.bar_chart([25.0, 100.0, 50.0], ["a", "b", "c"], "title")
    longest, half, quarter = bar_lengths(picture)
    assert longest > 600 and abs(half - longest / 2) <= 2 and abs(quarter - longest / 4) <= 2
    assert opaque_white_with_ink(picture)


def test_long_bar_charts_show_the_best_and_the_worst():
    picture = charts.bar_chart(np.arange(100.0), [str(i) for i in range(100)], limit=4)
    first, second, third = bar_lengths(picture)  # the last value is 0
    assert abs(second / first - 98 / 99) < 0.004 and abs(third / first - 1 / 99) < 0.004


def test_bars_of_undefined_values_and_empty_bars():
    assert charts.bar_chart([float("nan"), 50.0], ["a", "b"]).ndim == 3
    assert charts.bar_chart([], []).ndim == 3


def test_confusion_rows_are_scaled_to_their_sum_with_true_classes_downwards():
    from matplotlib import colormaps

    low, middle, high = (colormaps["Blues"](share, bytes=True)[:3] for share in (0.0, 0.5, 1.0))
    table = np.array([[0, 10, 0], [0, 4, 0], [1, 0, 1]])
    picture = charts.confusion_chart(table, ["a", "b", "c"], "title")
    cells = painted(picture, low) | painted(picture, middle) | painted(picture, high)
    rows = np.flatnonzero(cells.sum(axis=1) > cells.sum(axis=1).max() * 0.8)
    columns = np.flatnonzero(cells[rows].sum(axis=0) > len(rows) * 0.8)
    height, width = (len(pixels) // 3 for pixels in (rows, columns))
    for i, expected in enumerate(((low, high, low), (low, high, low), (middle, low, middle))):
        for j, color in enumerate(expected):
            # a quarter of the way into the cell, away from the number at its center
            pixel = picture[rows[0] + i * height + height // 4, columns[0] + j * width + width // 4]
            assert tuple(pixel) == tuple(color), (i, j)
    assert picture.shape == (960, 960, 3) and charts.confusion_chart(np.eye(40), [str(i) for i in range(40)]).ndim == 3


def test_scatter_points_lie_at_their_coordinates():
    picture = charts.scatter_chart([[0, 0], [1, 1], [0, 1]], [0, 1, 2], ["a", "b", "c"])
    centers = {}
    for label in range(3):
        pixels = np.argwhere(painted(picture, PALETTE[label]))
        centers[label] = pixels[pixels[:, 1] < pixels[:, 1].min() + 12].mean(
            axis=0
        )  # without the legend, further right
    assert centers[0][0] > centers[1][0] + 300 and centers[0][1] < centers[1][1] - 300  # (0, 0) below, left of (1, 1)
    assert np.allclose(centers[2], (centers[1][0], centers[0][1]), atol=1)
    assert opaque_white_with_ink(picture)


def test_scatter_triangles_lie_above_the_points():
    names = ["a", "b", "centers", "joint"]
    plain = charts.scatter_chart([[0, 0], [1, 1], [0.5, 0.5]], [0, 0, 1], names)
    marked = charts.scatter_chart(
        [[0, 0], [1, 1], [0.5, 0.5]], [0, 0, 1], names[:2], triangles={"centers": [[0, 1]], "joint": [[0.5, 0.5]]}
    )
    below = slice(200, 600)  # of the picture's rows: the legend is above, the corners are outside
    point = np.argwhere(painted(plain, PALETTE[1])[below])
    triangle = np.argwhere(painted(marked, charts.RED)[below])
    assert len(triangle) > len(point) > 20 and np.allclose(triangle.mean(axis=0), point.mean(axis=0), atol=8)
    assert not painted(plain, charts.RED).any() and not painted(marked, PALETTE[1])[below].any()


def test_interval_chart_is_sorted_by_mean_and_spans_the_samples():
    picture = charts.interval_chart({"gap": [40.0, 42.0], "gem": [42.0, 44.0], "alone": [41.5]}, "t")
    dots, means = (np.argwhere(painted(picture, color)) for color in PALETTE[:2])
    rows = np.unique(means[:, 0])
    top, middle, bottom = np.split(rows, np.flatnonzero(np.diff(rows) > 5) + 1)
    mean_of = [means[np.isin(means[:, 0], part), 1].mean() for part in (top, middle, bottom)]
    assert mean_of[0] > mean_of[1] > mean_of[2]  # 43, 41.5, 41
    assert abs((mean_of[0] - mean_of[1]) / (mean_of[1] - mean_of[2]) - 3) < 0.2
    first = dots[np.isin(dots[:, 0], top), 1]
    assert abs((first.min() + first.max()) / 2 - mean_of[0]) <= 1  # 42 and 44 around 43


def test_line_chart_draws_each_series_where_it_belongs():
    series = {"up": [(0, 0), (10, 1)], "flat": [(0, 0.5), (10, 0.5)]}
    picture = charts.line_chart(series, "title", size=(400, 600), x_name="step")
    assert picture.shape == (400, 600, 3) and opaque_white_with_ink(picture)
    rows, columns = np.nonzero(painted(picture[110:], PALETTE[0]))  # below title and legend
    assert rows[columns.argmin()] > rows[columns.argmax()]
    assert np.corrcoef(rows, columns)[0, 1] < -0.99
    flat, _ = np.nonzero(painted(picture[110:], PALETTE[1]))
    assert flat.max() - flat.min() <= 5 and rows.min() < flat.mean() < rows.max()


def test_titles_and_legends_are_drawn():
    series = {"loss": [(0, 1), (1, 0)]}
    plain, titled = charts.line_chart(series), charts.line_chart(series, "a title")
    assert (titled[:40] != 255).any(-1).sum() > 200 and plain.shape == titled.shape
    assert not np.array_equal(titled, charts.line_chart({"other": series["loss"]}, "a title"))


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_long_names_leave_the_axes_their_width(count):
    """A legend wider than the figure would squeeze the axes to a strip."""
    points = [(0, 0), (1, 1)]
    picture = charts.line_chart({f"maskwise student, run {number}": points for number in range(count)})
    last = PALETTE[(count - 1) % len(PALETTE)]  # which covers the others
    _, columns = np.nonzero(painted(picture[-250:], last))
    assert columns.max() - columns.min() > 0.3 * charts.SIZE[1]
    short = charts.line_chart(dict.fromkeys("abcd"[: min(count, 4)], points))
    assert painted(short[:60], PALETTE[min(count, 4) - 1]).any(), "short names stay on one line"


def test_line_chart_of_no_point_one_point_and_extremes():
    for points in ([], [(1, 1)], [(0, float("nan"))], [(0, 1e-9), (1e6, 1.1e-9)], [(5, -3), (5, -3)]):
        assert charts.line_chart({"loss": points}).shape == (*charts.SIZE, 3)
    assert charts.line_chart({}).shape == (*charts.SIZE, 3)
    assert painted(charts.line_chart({"loss": [(1, 1)]}), PALETTE[0]).sum() > 20


def test_every_label_has_its_own_color():
    for count in (1, 7, 8, 100):
        assert len(np.unique(charts.distinct_colors(count), axis=0)) == count


def test_charts_leave_matplotlib_settings_unchanged():
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.line_chart({"loss": [(0, 1)]})
    assert dict(matplotlib.rcParams) == before


def test_importing_charts_does_not_import_matplotlib():
    import subprocess
    import sys

    code = "import sys, maskwise.imaging.charts, maskwise.api; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0

"""Connected components of a map above every level at once, as runs of pixels in its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from maskwise.errors import UserError

MOST_RUNS = 1 << 20  # at a time, about 200 MB


@dataclasses.dataclass
class Runs:
    """Runs of pixels above levels, int64 [n] each, ordered by level, row and column.

    first, last: columns, inclusive; row; level: the run's pixels have values > level, the pixels next to it do not.
    """

    level: np.ndarray
    row: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.level)

    def select(self, rows) -> Runs:
        """Return some of the runs, in order."""
        return Runs(self.level[rows], self.row[rows], self.first[rows], self.last[rows])

    def keys(self, columns: np.ndarray, width: int, height: int, below: int = 0) -> np.ndarray:
        """Return numbers that order columns of these runs' rows (or of the row below) among all levels and rows."""
        return (self.level * (height + 1) + self.row + below) * (width + 2) + columns + 1


@dataclasses.dataclass
class LevelSets:
    """The sets {value > level} of a map of a shape (h, w), for a range of levels: their runs, and those of their holes.

    hole: int64, the number of the hole of each of `holes`, from 0.
    """

    shape: tuple[int, int]
    runs: Runs
    holes: Runs
    hole: np.ndarray


def level_sets(levels: np.ndarray, top: int = 255) -> list[LevelSets]:
    """Return the sets of pixels > level for level 0 .. top - 1 of integers 0 .. top, [H, W], in ranges of levels.

    Holes are the 4-connected components of the other pixels that no border of the map touches. Raises UserError without
    SciPy.
    """
    return [
        LevelSets(levels.shape, runs_above(levels, low, high), *hole_runs(levels, low, high, top))
        for low, high in level_ranges(levels, top)
    ]


def contour_boxes(parts: list[LevelSets]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of all contours -> level int64 [n], boxes int64 [n, 4] as x0, y0, x1, y1, inclusive.

    Contours are the outer borders of 8-connected components and the borders of their holes, whose pixels surround the
    hole: the set of OpenCV's findContours with RETR_TREE.
    """
    level, boxes = [], []
    for part in parts:
        component = components(part.runs, part.shape, 8)
        level += [part.runs.level[first_of(component)], part.holes.level[first_of(part.hole)]]
        around = bounding_boxes(part.holes, part.hole) + np.array([-1, -1, 1, 1])
        boxes += [bounding_boxes(part.runs, component), around]
    return np.concatenate(level), np.concatenate(boxes)


def largest_contour_boxes(parts: list[LevelSets]) -> tuple[np.ndarray, np.ndarray]:
    """Return the box of the contour of largest area at each level -> level int64 [n], boxes int64 [n, 4].

    See `contour_boxes`. Area is that of the polygon through pixel centers; of equal ones the last in raster order of
    their first pixels counts, OpenCV's first contour. Levels without pixels are missing.
    """
    level, boxes = [], []
    for part in parts:
        runs = filled(part.runs, part.holes, part.shape)
        component = components(runs, part.shape, 8)
        first, area = first_of(component), polygon_areas(runs, component, part.shape)
        of_level = runs.level[first]
        order = np.lexsort((first, area, of_level))
        best = order[np.append(of_level[order][1:] != of_level[order][:-1], True)] if len(order) else order
        level.append(of_level[best])
        boxes.append(bounding_boxes(runs, component)[best])
    return np.concatenate(level), np.concatenate(boxes)


def level_ranges(levels: np.ndarray, top: int) -> Iterator[tuple[int, int]]:
    """Split 0 .. top into ranges of so many levels that their runs fit into memory."""
    rises = np.diff(levels.astype(np.int64), axis=1, prepend=0)
    parts = min(top, int(rises.clip(min=0).sum()) // MOST_RUNS + 1)
    for part in range(parts):
        yield part * top // parts, (part + 1) * top // parts


def runs_above(values: np.ndarray, low: int, high: int) -> Runs:
    """Return the runs of pixels > level for low <= level < high of integers [H, W]."""
    height, width = values.shape
    small = high * (height + 1) * (width + 2) < np.iinfo(np.int32).max  # half the memory traffic
    padded = np.full((height, width + 2), low, dtype=np.int32 if small else np.int64)
    padded[:, 1:-1] = values.clip(low, high)
    change = np.diff(padded, axis=1)  # at column x: from x - 1 to x
    borders = []
    for rises in (change, -change):  # a run starts where values rise above a level, and ends where they fall to it
        row, column = np.nonzero(rises > 0)
        count = rises[row, column]
        lowest = np.minimum(padded[row, column], padded[row, column + 1])
        step = height * (width + 1)  # between a key of one level and that of the next
        key = (lowest * height + row.astype(lowest.dtype)) * (width + 1) + column.astype(lowest.dtype)
        key -= (np.cumsum(count, dtype=key.dtype) - count) * step
        borders.append(np.sort(np.repeat(key, count) + np.arange(count.sum(), dtype=key.dtype) * step))
    first, after = borders
    level, row = np.divmod(first // (width + 1), height)
    return Runs(level, row, first % (width + 1), after % (width + 1) - 1)


def hole_runs(levels: np.ndarray, low: int, high: int, top: int) -> tuple[Runs, np.ndarray]:
    """Return the runs of 4-connected components of {value <= level} that no border of the map touches, and these."""
    height, width = levels.shape
    runs = runs_above(top - levels.astype(np.int64), top - high, top - low)
    component = components(runs, levels.shape, 4)
    x0, y0, x1, y1 = bounding_boxes(runs, component).T
    inside = ((x0 > 0) & (y0 > 0) & (x1 < width - 1) & (y1 < height - 1))[component]
    runs, component = runs.select(inside), component[inside]
    runs.level = (top - 1 - runs.level).astype(runs.level.dtype)
    return runs, np.unique(component, return_inverse=True)[1]


def filled(runs: Runs, holes: Runs, shape: tuple[int, int]) -> Runs:
    """Join the runs that only a hole separates: the runs of the map with holes filled."""
    height, width = shape
    before_hole = np.isin(runs.keys(runs.last + 1, width, height), holes.keys(holes.first, width, height))
    starts = np.append(True, ~before_hole[:-1])[: len(runs)]
    joined = runs.select(starts)
    joined.last = runs.last[~before_hole]
    return joined


def touching(runs: Runs, shape: tuple[int, int], reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of runs of successive rows of a level that share a column, or with reach=1 a diagonal."""
    height, width = shape
    starts, ends = runs.keys(runs.first, width, height), runs.keys(runs.last, width, height)
    low = np.searchsorted(ends, runs.keys(runs.first - reach, width, height, below=1))
    high = np.searchsorted(starts, runs.keys(runs.last + reach, width, height, below=1), side="right")
    count = high - low
    upper = np.repeat(np.arange(len(runs), dtype=np.int32), count)
    return upper, np.repeat((low - np.cumsum(count) + count).astype(np.int32), count) + np.arange(
        len(upper), dtype=np.int32
    )


def components(runs: Runs, shape: tuple[int, int], connectivity: int) -> np.ndarray:
    """Return the number of the connected component (8 or 4 neighbors) of each run, int64 [n], from 0."""
    try:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components
    except ImportError:
        raise UserError("boxes of score maps need SciPy: pip install 'maskwise[eval]'") from None
    upper, lower = touching(runs, shape, 1 if connectivity == 8 else 0)
    graph = coo_matrix((np.ones(len(upper), dtype=bool), (upper, lower)), shape=(len(runs), len(runs)))
    return connected_components(graph, directed=False)[1].astype(np.int64) if len(runs) else np.zeros(0, np.int64)


def first_of(component: np.ndarray) -> np.ndarray:
    """Return the index of the first run of each component, int64 [components]."""
    return np.unique(component, return_index=True)[1]


def bounding_boxes(runs: Runs, component: np.ndarray) -> np.ndarray:
    """Return the boxes of the components, int64 [components, 4] as x0, y0, x1, y1, inclusive."""
    count = int(component.max()) + 1 if len(component) else 0

    def extreme(ufunc: np.ufunc, values: np.ndarray, start: int) -> np.ndarray:
        side = np.full(count, start, dtype=values.dtype)  # contiguous and of the same type, where ufunc.at is fast
        ufunc.at(side, component, values)
        return side

    most = np.iinfo(np.int32).max
    low = [extreme(np.minimum, values, most) for values in (runs.first, runs.row)]
    high = [extreme(np.maximum, values, -1) for values in (runs.last, runs.row)]
    return np.stack([*low, *high], axis=1).astype(np.int64)


def polygon_areas(runs: Runs, component: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the areas of the polygons through the border pixels' centers of components without holes, float64.

    A square of four neighboring pixels adds 1 if the component has all of them, and 1/2 if it has three.
    """
    upper, lower = touching(runs, shape, 0)
    shared = np.minimum(runs.last[upper], runs.last[lower]) - np.maximum(runs.first[upper], runs.first[lower])
    corners = (runs.first[upper] != runs.first[lower]).astype(int) + (runs.last[upper] != runs.last[lower])
    count = int(component.max()) + 1 if len(component) else 0
    return np.bincount(component[upper], weights=shared + 0.5 * corners, minlength=count)

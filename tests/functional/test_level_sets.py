"""Contours at every level: against SciPy's components level by level, OpenCV, and shapes with known answers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from maskwise.functional import level_sets

EIGHT = np.ones((3, 3))


def maps():
    g = np.random.default_rng(0)
    smooth = F.interpolate(torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(0)), (41, 58), mode="bicubic")
    yield from ((255 * (m - m.min()) / (m.max() - m.min())).to(torch.uint8).numpy() for m in smooth[:, 0])
    yield g.integers(0, 256, (19, 23)).astype(np.uint8)  # many holes, spikes, diagonals
    yield (g.random((24, 17)) > 0.55).astype(np.uint8) * 255
    yield (g.integers(0, 4, (30, 30)) * 85).astype(np.uint8)
    yield np.zeros((5, 6), np.uint8)
    yield np.full((4, 4), 255, np.uint8)


def boxes_of(labels):
    return [(s[1].start, s[0].start, s[1].stop - 1, s[0].stop - 1) for s in ndimage.find_objects(labels)]


def contours_by_scipy(inside):
    boxes = boxes_of(ndimage.label(inside, EIGHT)[0])
    outside, _ = ndimage.label(np.pad(~inside, 1, constant_values=True))  # 1: all that a border of the map touches
    holes = [(x0 - 2, y0 - 2, x1, y1) for x0, y0, x1, y1 in boxes_of(outside)[1:]]
    return boxes + holes


def largest_by_scipy(inside):
    labels, count = ndimage.label(ndimage.binary_fill_holes(inside), EIGHT)
    squares = np.stack([labels[:-1, :-1], labels[1:, :-1], labels[:-1, 1:], labels[1:, 1:]])
    owner, pixels = squares.max(0), (squares > 0).sum(0)
    area = [(pixels == 4)[owner == k].sum() + 0.5 * (pixels == 3)[owner == k].sum() for k in range(1, count + 1)]
    first = [int(np.flatnonzero(labels == k)[0]) for k in range(1, count + 1)]
    best = max(range(count), key=lambda k: (area[k], first[k]))
    return boxes_of(labels)[best]


def contours(levels):
    parts = level_sets.level_sets(levels)
    return level_sets.contour_boxes(parts), level_sets.largest_contour_boxes(parts)


def at_level(found, level):
    levels, boxes = found
    return sorted(map(tuple, boxes[levels == level].tolist()))


@pytest.mark.parametrize("number", range(7))
def test_contours_are_those_of_scipy_level_by_level(number):
    levels = list(maps())[number]
    every, largest = contours(levels)
    for level in range(255):
        inside = levels > level
        assert at_level(every, level) == sorted(contours_by_scipy(inside)), level
        assert at_level(largest, level) == ([largest_by_scipy(inside)] if inside.any() else []), level


@pytest.mark.parametrize("number", range(5))
def test_contours_are_those_of_opencv(number):
    cv2 = pytest.importorskip("cv2")
    levels = list(maps())[number]
    every, largest = contours(levels)
    for level in range(0, 255, 3):
        found = cv2.findContours((levels > level).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
        boxes = {id(contour): cv2.boundingRect(contour) for contour in found}
        corners = {key: (x, y, x + width - 1, y + height - 1) for key, (x, y, width, height) in boxes.items()}
        assert at_level(every, level) == sorted(corners.values()), level
        assert at_level(largest, level) == [corners[id(max(found, key=cv2.contourArea))]], level


def drawn(text):
    return np.array([[255 * (sign == "#") for sign in line] for line in text.split()], dtype=np.uint8)


def test_the_hole_of_a_ring_is_a_contour_of_the_pixels_around_it():
    ring = drawn("....... .#####. .#...#. .#.#.#. .#...#. .#####.")
    assert at_level(contours(ring)[0], 0) == [(1, 1, 5, 5), (1, 1, 5, 5), (3, 3, 3, 3)]
    assert at_level(contours(ring)[1], 254) == [(1, 1, 5, 5)]


def test_area_is_that_of_the_polygon_and_not_of_the_pixels():
    line_and_square = drawn("######### ......... ...##.... ...##....")
    assert at_level(contours(line_and_square)[1], 0) == [(3, 2, 4, 3)], "a line has no area"
    diamond = drawn(".#. #.# .#. ... .## .##")
    assert at_level(contours(diamond)[1], 0) == [(0, 0, 2, 2)], "2 against 1 with the hole"


def test_of_equal_areas_the_last_in_raster_order_is_opencvs_first():
    assert at_level(contours(drawn("##.## ##.## ..... ##... ##..."))[1], 0) == [(0, 3, 1, 4)]
    assert at_level(contours(drawn("##.## ##.##"))[1], 0) == [(3, 0, 4, 1)]


def test_parts_of_the_levels_give_the_same_boxes(monkeypatch):
    levels = next(maps())
    whole = contours(levels)
    monkeypatch.setattr(level_sets, "MOST_RUNS", 500)
    assert len(list(level_sets.level_ranges(levels, 255))) > 3
    parts = contours(levels)
    for one, other in zip(whole, parts):
        assert [at_level(one, level) for level in range(255)] == [at_level(other, level) for level in range(255)]

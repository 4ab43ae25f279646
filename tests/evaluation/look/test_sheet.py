"""The sheet of one image: what stands where, and its colors at known points."""

import numpy as np
import pytest

from maskwise.evaluation.look.codes import colors, encode
from maskwise.evaluation.look.maps import maps_of
from maskwise.evaluation.look.sheet import SIDE, bands_of, columns_of, patch_at
from maskwise.functional.attention import mass_mask
from maskwise.imaging.drawing import heat
from maskwise.imaging.panels import GAP, HEADING, MARGIN, TITLE, Band, Panel, panel_sheet
from support.looked import image, vit


@pytest.fixture(scope="module")
def seen():
    maps = maps_of(vit(), image(48, 80), "a.png", side=64)
    return maps, colors([encode(maps.tokens, 24)])[0]


def center(row, column, picture, grid=(6, 10)):
    height, width = (side / count for side, count in zip(picture.shape[:2], grid))
    return picture[int((row + 0.5) * height), int((column + 0.5) * width)].astype(int)


def test_panels_show_the_maps(seen):
    maps, colored = seen
    bands = bands_of(maps, colored, ratio=0.3, mass=0.5, point=(0.35, 0.9))
    assert [band.heading for band in bands] == [
        "a.png",
        "Masks at 30 % of the patches",
        "Heads, block 3",
        "Blocks, heads merged",
    ]
    first, masks, heads, blocks = (band.panels for band in bands)
    assert [len(band.panels) for band in bands] == [5, 5, 2, 3] and first[0].picture.shape == (192, SIDE, 3)
    picture, chosen = first[0].picture, mass_mask(maps.guide[None], 0.5)[0].reshape(6, 10)
    assert f"50 % of it in {int(chosen.sum())} of 60 patches" == first[2].title
    hot = heat(maps.guide.reshape(6, 10).numpy())
    similar = heat((maps.tokens @ maps.tokens[5 * 10 + 3]).reshape(6, 10).numpy())
    for row, column in ((0, 0), (2, 7), (5, 3), (5, 9)):
        below = center(row, column, picture)
        assert np.abs(center(row, column, first[1].picture) - (0.25 * below + 0.75 * hot[row, column])).max() <= 1
        red = 0.45 * below + 0.55 * np.array([214, 40, 40])
        wanted = red if chosen[row, column] else below
        assert np.abs(center(row, column, first[2].picture) - wanted).max() <= 1
        wanted = 0.25 * below + 0.75 * similar[row, column]
        assert np.abs(center(row, column, first[3].picture) - wanted).max() <= 1
        assert np.array_equal(center(row, column, first[4].picture), colored.reshape(6, 10, 3)[row, column])
        for panel, mask in zip(masks, maps.masks.values()):
            gray = 0.08 * below + 0.92 * np.array([118, 118, 124])
            wanted = gray if mask[30].reshape(6, 10)[row, column] else below
            assert np.abs(center(row, column, panel.picture) - wanted).max() <= 1, panel.title
        for panel, values in zip(heads, maps.layers[-1].heads):
            colored_head = heat(values.reshape(6, 10).numpy())[row, column]
            assert np.abs(center(row, column, panel.picture) - (0.25 * below + 0.75 * colored_head)).max() <= 1
    assert first[3].mark == (3 * 32, 5 * 32, 4 * 32, 6 * 32)
    assert first[0].boxes["LOST"] == tuple(4 * value for value in maps.boxes["LOST"])
    assert [panel.title for panel in blocks] == ["block 1", "block 2", "block 3"]


def test_pictures_and_boxes_lie_at_their_places():
    left, right = np.zeros((40, 60, 3), np.uint8), np.full((40, 60, 3), (10, 200, 30), np.uint8)
    right[20:] = (90, 20, 160)
    band = Band("heading", [Panel("", left, boxes={"LOST": (15, 10, 45, 30)}), Panel("", right)], 2)
    sheet = panel_sheet([band], width=400)
    wide = (400 - 2 * MARGIN - GAP) // 2
    tall, top = round(wide * 40 / 60), MARGIN + HEADING + TITLE
    assert sheet.shape == (top + tall + GAP + MARGIN, 400, 3) and sheet.dtype == np.uint8
    second = MARGIN + wide + GAP
    assert (sheet[top + 3 : top + tall // 2 - 3, second + 3 : second + wide - 3] == (10, 200, 30)).all()
    assert (sheet[top + tall // 2 + 3 : top + tall - 3, second + 3 : second + wide - 3] == (90, 20, 160)).all()
    assert (sheet[top + 3 : top + tall - 3, second - GAP + 2 : second - 2] == 255).all()
    box = sheet[round(top + tall / 2), round(MARGIN + wide / 4) - 1 : round(MARGIN + wide / 4) + 2]
    assert (box == (255, 122, 26)).all(axis=1).any() and (sheet[top + tall // 2, MARGIN + wide // 2] == 0).all()
    assert (sheet[top + tall // 2, MARGIN + 5] == 0).all()


def test_rows_are_balanced_and_points_fall_into_patches():
    assert [columns_of(count) for count in (1, 6, 8, 9, 12, 16, 24)] == [1, 6, 8, 5, 6, 8, 8]
    assert patch_at((0, 0), (6, 10)) == 0 and patch_at((1, 1), (6, 10)) == 59 and patch_at((0.5, 0.2), (6, 10)) == 15

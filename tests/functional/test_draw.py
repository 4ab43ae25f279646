import numpy as np
from maskwise.functional import draw


def test_heat_runs_from_dark_to_bright_and_keeps_patches_square():
    picture = draw.heat([[0.0, 0.5], [0.75, 1.0]], (8, 8))
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    grey = picture.astype(int).sum(-1)
    assert (grey[:4, :4] == grey[0, 0]).all()
    assert grey[0, 0] < grey[0, 7] < grey[7, 0] < grey[7, 7]


def test_heat_of_a_flat_or_broken_map_is_a_picture():
    for values in (np.zeros((3, 3)), np.full((2, 2), np.nan), [[np.inf, 1.0], [2.0, np.nan]]):
        assert draw.heat(values).dtype == np.uint8


def test_mask_covers_hidden_patches_only():
    image = np.full((6, 9, 3), 200, dtype=np.uint8)
    mask = np.zeros((2, 3), dtype=bool)
    mask[1, 2] = True
    shown = draw.overlay_mask(image, mask, color=(0, 0, 0), alpha=1.0)
    assert (shown[3:, 6:] == 0).all() and (shown[:3] == 200).all() and (shown[:, :6] == 200).all()
    assert draw.overlay_heat(image, mask, alpha=0.0).tolist() == image.tolist()


def test_sheet_holds_every_tile():
    tiles = [[np.full((10, 10, 3), 10 * (row * 2 + column), dtype=np.uint8) for column in range(2)] for row in range(2)]
    sheet = draw.sheet(tiles, titles=("a", "b"), labels=("x", "y"), tile=16)
    for value in (0, 10, 20, 30):
        assert (sheet == value).all(-1).sum() >= 256
    assert draw.sheet([]).ndim == 3


def test_text_has_a_glyph_for_what_charts_write():
    for character in "0123456789abcdefghijklmnopqrstuvwxyz.-+%/()":
        assert draw.text(character).any()
    assert not draw.text(" ").any() and draw.text("").shape[1] == 0
    shapes = {draw.text(character).tobytes() for character in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert len(shapes) == 36


def test_chart_draws_each_series_where_it_belongs():
    picture = draw.chart({"up": [(0, 0), (10, 1)], "flat": [(0, 0.5), (10, 0.5)]}, "title", size=(200, 300))
    assert picture.shape == (200, 300, 3)
    rows, columns = np.nonzero((picture[44:164] == draw.PALETTE[0]).all(-1))
    assert rows[columns.argmin()] > rows[columns.argmax()]
    assert np.corrcoef(rows, columns)[0, 1] < -0.99


def test_chart_of_nothing_of_one_point_and_of_extremes():
    for points in ([], [(1, 1)], [(0, float("nan"))], [(0, 1e-9), (1e6, 1.1e-9)], [(5, -3), (5, -3)]):
        assert draw.chart({"loss": points}).shape == (360, 640, 3)
    assert draw.chart({}).shape == (360, 640, 3)


def test_png_round_trip(tmp_path):
    from PIL import Image

    picture = draw.heat(np.random.default_rng(0).random((5, 7)))
    draw.write_png(tmp_path / "new" / "map.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "map.png")), picture)

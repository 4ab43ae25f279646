import numpy as np
import pytest
from PIL import Image

from maskwise.imaging import drawing


def test_heat_runs_from_dark_to_bright_and_keeps_patches_square():
    picture = drawing.heat([[0.0, 0.5], [0.75, 1.0]], (8, 8))
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    gray = picture.astype(int).sum(-1)
    assert (gray[:4, :4] == gray[0, 0]).all()
    assert gray[0, 0] < gray[0, 7] < gray[7, 0] < gray[7, 7]


def test_heat_of_a_constant_or_non_finite_map_is_valid():
    for values in (np.zeros((3, 3)), np.full((2, 2), np.nan), [[np.inf, 1.0], [2.0, np.nan]]):
        assert drawing.heat(values).dtype == np.uint8


def test_mask_covers_masked_patches_only():
    image = np.full((6, 9, 3), 200, dtype=np.uint8)
    mask = np.zeros((2, 3), dtype=bool)
    mask[1, 2] = True
    shown = drawing.overlay_mask(image, mask, color=(0, 0, 0), alpha=1.0)
    assert (shown[3:, 6:] == 0).all() and (shown[:3] == 200).all() and (shown[:, :6] == 200).all()
    assert drawing.overlay_heat(image, mask, alpha=0.0).tolist() == image.tolist()


def test_sheet_holds_every_tile_at_its_place():
    tiles = [[np.full((10, 10, 3), 10 * (row * 2 + column), dtype=np.uint8) for column in range(2)] for row in range(2)]
    sheet = drawing.sheet(tiles, titles=("a", "b"), labels=("x", "y"), tile=16)
    plain = drawing.sheet(tiles, tile=16)
    assert plain.shape == (2 * 20 + 4, 2 * 20 + 4, 3) and sheet.shape[1] == plain.shape[1]
    for value, (top, left) in zip((0, 10, 20, 30), ((4, 4), (4, 24), (24, 4), (24, 24))):
        assert (plain[top : top + 16, left : left + 16] == value).all()
        assert (sheet == value).all(-1).sum() >= 256
    assert drawing.sheet([]).ndim == 3


def test_pictures_keep_their_aspect_ratio():
    wide, tall = np.full((24, 40, 3), 90, dtype=np.uint8), np.full((40, 20, 3), 90, dtype=np.uint8)
    for picture, height in ((wide, 60), (tall, 200)):
        sheet = drawing.sheet([[picture]], tile=100)
        assert sheet.shape == (height + 8, 108, 3) and (sheet[4:-4, 4:-4] == 90).all()
        labeled = drawing.sheet([[picture]] * 2, labels=("x", ""), tile=100)
        line = labeled.shape[0] // 2 - height - 6
        assert (labeled[4 + height + line + 4 :][:height, 4:-4] == 90).all()
    shown = drawing.sheet([[drawing.heat([[0.0, 1.0]], (24, 40))]], tile=80)[4:-4, 4:-4]
    assert shown.shape == (48, 80, 3) and (shown[:, :40] == shown[0, 0]).all() and (shown[:, 40:] == shown[0, -1]).all()


def test_titles_stand_above_and_labels_below_their_pictures():
    tile = np.full((64, 64, 3), 200, dtype=np.uint8)
    sheet = drawing.sheet([[tile, tile]], titles=("image", ""), labels=("label",), tile=64)
    line = (sheet.shape[0] - 64 - 8) // 2  # height of the title's and of the label's line
    dark = (sheet < 120).all(-1)
    assert dark[: 4 + line, 4:68].sum() > 20 and not dark[: 4 + line, 72:].any()
    assert dark[4 + line + 64 :].sum() > 20 and not dark[4 + line : 4 + line + 64].any()


def test_long_titles_are_shortened_to_the_picture():
    sheet = drawing.sheet([[np.zeros((32, 32, 3), np.uint8)] * 2], titles=("m" * 99, ""), tile=100)
    dark = (sheet[:20] < 120).all(-1)
    assert dark[:, :104].any() and not dark[:, 104:].any()


def test_a_frame_covers_the_border_only():
    picture = drawing.framed(np.zeros((64, 64, 3), dtype=np.uint8), (9, 8, 7))
    frame = (picture == (9, 8, 7)).all(-1)
    assert frame[0].all() and frame[-1].all() and frame[:, 0].all() and not frame[10:50, 10:50].any()


def test_png_round_trip(tmp_path):
    picture = drawing.heat(np.random.default_rng(0).random((5, 7)))
    drawing.write_png(tmp_path / "new" / "map.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "map.png")), picture)


def test_interrupted_write_keeps_the_earlier_picture(tmp_path, monkeypatch):
    def stop(picture, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    drawing.write_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        drawing.write_png(tmp_path / "a.png", np.ones((2, 2, 3), np.uint8))
    assert (tmp_path / "a.png").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]

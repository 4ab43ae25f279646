"""Benchmark sets that the script of all evaluations derives from the packs."""

import numpy as np
import pytest
from PIL import Image

from launch.reproduce import derived_sets
from launch.reproduce.packs import new_folder

BOX = (16, 20, 39, 43)  # x0, y0, x1, y1, inclusive


@pytest.fixture
def boxed(tmp_path):
    """A pack of one test image per IN-9 class: its number as red, a green box, blue rows below."""
    folder = tmp_path / "pack"
    rows = ["path,x0,y0,x1,y1,wnid"]
    for label in range(9):
        image = np.zeros((64, 64, 3), np.uint8)
        image[..., 0] = 10 + label
        image[44:, :, 2] = 200
        image[20:44, 16:40] = (0, 90 + label, 0)
        (folder / "val" / f"n{label}").mkdir(parents=True)
        Image.fromarray(image).save(folder / "val" / f"n{label}" / "a.png")
        rows.append(f"val/n{label}/a.png,{','.join(map(str, BOX))},n{label}")
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.csv").write_text("wnid,in9_index\n" + "".join(f"n{label},{label}\n" for label in range(9)))
    return folder


def test_in9_variants_have_their_pixels(boxed, tmp_path):
    place = derived_sets.in9_from_boxes(boxed, tmp_path / "in9", per_class=2)
    pictures = {
        variant.name: np.array(Image.open(next((variant / "val").glob("03_*/0000.png")))) for variant in place.iterdir()
    }
    original = pictures["original"]
    inside = np.zeros((64, 64), bool)
    inside[20:44, 16:40] = True
    assert (pictures["only_fg"][inside] == original[inside]).all() and not pictures["only_fg"][~inside].any()
    assert (pictures["only_bg_b"][~inside] == original[~inside]).all() and not pictures["only_bg_b"][inside].any()
    assert (pictures["only_bg_t"][~inside] == original[~inside]).all()
    assert not (pictures["only_bg_t"][inside][:, 1] > 0).any()  # tiles of background, nothing of the object
    for variant, background in (("mixed_same", 3), ("mixed_next", 4), ("mixed_rand", 4)):
        assert (pictures[variant][inside] == original[inside]).all()
        assert (pictures[variant][:20, :, 0] == 10 + background).all()
    assert derived_sets.in9_from_boxes(boxed, place, per_class=2) == place  # written once


def test_copies_lie_in_the_layout_of_copydays(tmp_path):
    (tmp_path / "pack" / "db").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (60, 48), (40 * number, 90, 120)).save(tmp_path / "pack" / "db" / f"{number}.jpg")
    place = derived_sets.copies(tmp_path / "pack", tmp_path / "copies", count=3)
    files = sorted(str(path.relative_to(place)) for path in place.rglob("*.jpg"))
    groups = (("crops/50", "00"), ("jpegqual/10", "00"), ("original", "00"), ("strong", "01"))
    assert files == [f"{group}/{number:04d}{view}.jpg" for group, view in groups for number in range(3)]
    assert Image.open(place / "crops/50/000100.jpg").size == (43, 33)
    gray = np.array(Image.open(place / "strong/000001.jpg")).astype(int)
    assert abs(gray - gray.mean(-1, keepdims=True)).max() < 3


def test_an_interrupted_folder_is_not_taken_for_a_whole_one(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "set") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not (tmp_path / "set").exists()
    with new_folder(tmp_path / "set") as folder:
        (folder / "all").touch()
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["all"]

"""Values of stored images against the range they are read in: one line at the start, and the key that scales them."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.datasets import Folder, ImageList, Tar
from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.data.notes import notes
from maskwise.data.value_range import range_notes
from maskwise.errors import UserError


def ramp(high, low=0, dtype=np.uint16, size=(20, 30)):
    """An image whose values rise evenly from low to high."""
    return np.linspace(low, high, size[0] * size[1]).reshape(size).astype(dtype)


def folder(path, arrays, ending="png"):
    for k, array in enumerate(arrays):
        (path / "set").mkdir(exist_ok=True)
        if ending == "npy":
            np.save(path / "set" / f"{k}.npy", array)
        else:
            Image.fromarray(array).save(path / "set" / f"{k}.{ending}")
    return path / "set"


TWELVE = (
    "{} of {} images looked at come out nearly black (stored values from 6 to 4088): data.value_range=[0, 4095] "
    "scales them"
)


@pytest.mark.parametrize(
    "arrays, ending, line",
    [
        ([ramp(4095)] * 3, "png", TWELVE.format(3, 3)),
        ([ramp(4095)] * 12, "tif", TWELVE.format(8, 8)),
        ([ramp(65535)] * 3, "png", None),
        ([ramp(4095), ramp(65535)], "png", None),
        ([ramp(255, dtype=np.uint8)], "png", None),
        (
            [ramp(9800, dtype=np.float32)],
            "tif",
            "1 of 1 images looked at are cut to 0..255 (stored values from 16.36 to 9784): "
            "data.value_range=[0, 9784] scales them",
        ),
        (
            [ramp(9800, 5000, np.float32)],
            "tif",
            "1 of 1 images looked at come out nearly white (stored values from 5008 to 9792): "
            "data.value_range=[5008, 9792] scales them",
        ),
        (
            [ramp(3071, -1024, np.int32)],
            "tif",
            "1 of 1 images looked at come out nearly black (stored values from -1017 to 3064): "
            "data.value_range=[-1017, 3064] scales them",
        ),
        ([ramp(1, dtype=np.float32)] * 2, "tif", None),
        ([ramp(200, dtype=np.float32)] * 2, "tif", None),
        (
            [ramp(1, dtype=np.float32), ramp(200, dtype=np.float32)],
            "tif",
            "2 of 2 images looked at are scaled unequally: floats up to 1 are read as 0..1, others as 0..255 (stored "
            "values from 0.001669 to 199.7): data.value_range=[0, 200] scales them",
        ),
        (
            [ramp(7, dtype=np.uint8)] * 2,
            "png",
            "2 of 2 images looked at are nearly black: are they masks, bytes of 0..1, or black under an alpha channel?",
        ),
        (
            [np.full((9, 9), 254, np.uint8)],
            "png",
            "1 of 1 images looked at are nearly white: are they masks, bytes of 0..1, or black under an alpha channel?",
        ),
    ],
)
def test_the_line_names_the_stored_values_and_the_remedy(tmp_path, arrays, ending, line):
    data = Folder(folder(tmp_path, arrays, ending))
    assert range_notes(data) == ([] if line is None else [line])
    assert notes({"data": data}) == ([] if line is None else [f"data: {line}"])


def test_a_hot_pixel_hides_nothing(tmp_path):
    big = np.tile(ramp(4095), (3, 3))
    big[3, 3] = 65535
    assert "data.value_range=[0, 4095]" in range_notes(Folder(folder(tmp_path, [big])))[0]


@pytest.mark.parametrize("bits, full", [(8, 255), (16, 65535)])
def test_the_key_scales_images_of_more_than_eight_bits(tmp_path, bits, full):
    places = [0, 299, 599]
    folder(tmp_path, [ramp(4095)])
    Image.fromarray(ramp(4095)).save(tmp_path / "set" / "1.tif")
    Image.fromarray(ramp(255, dtype=np.uint8)).save(tmp_path / "set" / "2.png")  # eight bits stay as they are
    data = Folder(tmp_path / "set", bits=bits, value_range=(0, 4095))
    stored = np.array([0, ramp(4095).ravel()[299], 4095]) / 4095
    for k in range(2):
        flat = data.image(k).flatten(1)
        assert flat.shape[0] == 3 and abs(flat[:, places].double().numpy() / full - stored).max() < 1 / 255
    assert data.image(2)[0].flatten()[places].tolist() == [value * full // 255 for value in (0, 127, 255)]
    assert range_notes(data) == []
    assert range_notes(Folder(tmp_path / "set", value_range=(0, 65535 * 99))) == []  # the eight-bit one is bright


def test_floats_signed_values_and_arrays(tmp_path):
    root = folder(tmp_path, [ramp(3000, -1000, np.int16), ramp(3000, -1000, np.float32)], "npy")
    data = Folder(root, channels=1, value_range=(-1000, 3000))
    for k in range(2):
        values = data.image(k)
        assert values.dtype == torch.uint8 and (int(values.min()), int(values.max())) == (0, 255)
        assert abs(values.double().mean() - 127.5) < 1
    with pytest.raises(Exception, match="an array of int16; images are uint8 or uint16, others need data.value_range"):
        Folder(root, channels=1).image(0)
    odd = np.array([[np.nan, np.inf, -np.inf, 500.0]], np.float32)
    np.save(root / "0.npy", odd)
    assert Folder(root, channels=1, value_range=(0, 1000)).image(0).flatten().tolist() == [0, 255, 0, 128]


def test_lists_tar_files_and_the_loader_scale_too(tmp_path):
    from data.datasets.test_tar import pack

    root = folder(tmp_path, [ramp(4095)] * 4)
    (tmp_path / "rows.txt").write_text("".join(f"set/{k}.png\n" for k in range(4)))
    pack(tmp_path / "a.tar", {f"{k}.png": (root / f"{k}.png").read_bytes() for k in range(4)})
    expected = Folder(root, value_range=(0, 4095)).image(0)
    assert int(expected.max()) == 255
    for kind, path in ((ImageList, tmp_path / "rows.txt"), (Tar, tmp_path / "a.tar")):
        assert torch.equal(kind(path, value_range=(0, 4095)).image(0), expected)
        assert "data.value_range=[0, 4095]" in range_notes(kind(path))[0]
    crops = MultiCrop(global_size=8, local_size=4, local_number=0)
    for jpeg_scaling in (False, True):
        stream = batches(
            Folder(root, value_range=(0, 4095)), crops, batch_size=4, total_steps=1, jpeg_scaling=jpeg_scaling
        )
        assert int(next(stream).global_crops.max()) > 128


def test_values_that_the_key_leaves_dark_and_impossible_ranges(tmp_path):
    root = folder(tmp_path, [ramp(4095)])
    (line,) = range_notes(Folder(root, value_range=(0, 60000)))
    assert line == (
        "1 of 1 images looked at are nearly black with data.value_range=[0, 60000] (stored values from 6 to 4088)"
    )
    with pytest.raises(UserError, match=r"data.value_range is \[9, 9\]; give the values that become black and white"):
        Folder(root, value_range=(9, 9))


def test_unreadable_images_are_passed_over(tmp_path):
    root = folder(tmp_path, [ramp(4095)] * 2)
    (root / "0.png").write_bytes(b"x")
    assert range_notes(Folder(root)) == [TWELVE.format(1, 1)]
    (root / "1.png").write_bytes(b"x")
    assert range_notes(Folder(root)) == []

"""The 200 odd and damaged files of the `nasty` pack, through the real loader: verdicts as its expectations.csv has them, pixels as Pillow's.

Where we differ from the list, on purpose: it asked Pillow a second time after a first error, which then hands out what it has.
"""

import csv

import numpy as np
import packs
import pytest
import torch
from PIL import Image, ImageOps

from maskwise.data import bands, decoders
from maskwise.data.decode import CorruptImage
from maskwise.data.listed import Listed
from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.data.reader import Decoded

REFUSED_HERE = {"png_broken/broken_data_stream.png", "png_broken/truncated_end_chunk.png"}
BOMBS = {"huge/decompression_bomb.gif", "huge/decompression_bomb.ico", "huge/max_size.jpg", "huge/png_decompression_dos.png", "other/l2rgb_read.bmp"}
DECODERS = [name for name in decoders.NAMES if name != "auto"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """(dataset, rows of expectations.csv in its order)."""
    folder = packs.unpack("nasty")
    rows = list(csv.DictReader(open(folder / "expectations.csv", newline="", encoding="utf-8")))
    path = tmp_path_factory.mktemp("nasty") / "list.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path"], *([row["path"]] for row in rows)])
    return Listed(path, root=str(folder)), rows


def readable(row) -> bool:
    return row["convert_rgb"] == "ok" and row["path"] not in REFUSED_HERE


def as_seen(path) -> np.ndarray:
    """A second derivation: Pillow's own turning and conversion, wide values by hand."""
    with Image.open(path) as image:
        image.load()
        bits = {"tiff/12bit.cropped.tif": 12}.get(f"{path.parent.name}/{path.name}", 16)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(int) * 2 ** (16 - bits) // 256
            return np.stack([grey] * 3, -1)
        if image.mode == "F":
            return np.stack([np.asarray(image).round()] * 3, -1)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_pack_is_whole(pack):
    data, rows = pack
    assert len(data) == len(rows) == 200 and sum(map(readable, rows)) == 152


@pytest.mark.parametrize("decoder", DECODERS)
def test_verdicts_and_pixels(pack, decoder):
    if decoders.trouble(decoder):
        pytest.skip(f"{decoder}: {decoders.trouble(decoder)}")
    data, rows = pack
    reader = Decoded(data, decoder)
    for index, row in enumerate(rows):
        try:
            image = reader.image(index)
        except CorruptImage as error:
            assert not readable(row), f"{row['path']}: {error}"
            assert error.name == row["path"] and error.reason and "\n" not in error.reason
            continue
        assert readable(row), row["path"]
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        gap = np.abs(image.permute(1, 2, 0).numpy().astype(int) - as_seen(data.root / row["path"]))
        assert gap.max() <= (0 if decoder == "pil" else 5), row["path"]


def test_bombs_are_refused_by_their_headers(pack):
    data, rows = pack
    for index, row in enumerate(rows):
        if row["path"] in BOMBS:
            with pytest.raises(CorruptImage, match="pixels|too large"):
                data.image(index)


@pytest.mark.parametrize("workers, jpeg_scaling", [(0, True), *(pytest.param(2, each, marks=pytest.mark.slow) for each in (False, True))])
def test_a_batch_of_all_of_them(pack, workers, jpeg_scaling):
    data, rows = pack
    crops = MultiCrop(global_size=32, local_size=16, local_number=2)
    stream = batches(data, crops, batch_size=200, total_steps=2, workers=workers, cache="none", jpeg_scaling=jpeg_scaling)
    first, second = stream
    damaged = {row["path"] for row in rows if not readable(row)}
    assert set(stream.corrupt) == damaged and stream.seen == 400 and stream.replaced == 2 * len(damaged)
    assert torch.equal(first.index.sort().values, torch.arange(200)) and not torch.equal(first.global_crops, second.global_crops)
    plain = next(batches(data, crops, batch_size=200, total_steps=1, cache="none", jpeg_scaling=jpeg_scaling))
    assert torch.equal(plain.global_crops, first.global_crops) and torch.equal(plain.local_crops, first.local_crops)


def test_orientations_of_one_photograph_agree(pack):
    """hopper_orientation_2..8.jpg are one picture: seen upright they look the same."""
    data, rows = pack
    seen = [data.image(index).float() for index, row in enumerate(rows) if "hopper_orientation_" in row["path"] and row["path"].endswith(".jpg")]
    assert len(seen) == 7
    for other in seen[1:]:
        assert (seen[0] - other).abs().mean() < 6
        assert (seen[0] - other.flip(2)).abs().mean() > 30


@pytest.mark.parametrize("channels, bits", [(1, 8), (1, 16), (3, 16), (4, 8)])
def test_other_channels_of_them_end_as_tensors_or_as_corrupt_images(pack, channels, bits):
    data, rows = pack
    read = 0
    for index, row in enumerate(rows):
        try:
            image = bands.decode(data.root / row["path"], row["path"], channels, bits)
        except CorruptImage as error:
            assert "\n" not in str(error)
            continue
        assert image.shape[0] == channels and image.numel() and image.dtype == (torch.uint16 if bits == 16 else torch.uint8)
        assert readable(row), row["path"]
        read += 1
    assert read > (140 if channels < 4 else 20)

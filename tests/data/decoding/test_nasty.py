"""The 200 odd and damaged files of the `nasty` pack through the real loader, against its expectations.csv and Pillow.

Intended difference: the list accepts partial pixels that Pillow returns when asked again after an error.
"""

import numpy as np
import pytest
import torch

from launch.reproduce import nasty
from launch.reproduce.nasty import DECODERS, as_seen, readable
from maskwise.data.decoding import jpeg, multichannel
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.data.reader import DecodedDataset
from support import packs

BOMBS = {
    "huge/decompression_bomb.gif",
    "huge/decompression_bomb.ico",
    "huge/max_size.jpg",
    "huge/png_decompression_dos.png",
    "other/l2rgb_read.bmp",
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Return the dataset and the rows of expectations.csv in its order."""
    return nasty.listed(packs.unpack("nasty"), tmp_path_factory.mktemp("nasty"))


def test_the_pack_is_complete(pack):
    data, rows = pack
    assert len(data) == len(rows) == 200 and sum(map(readable, rows)) == 152
    counts = nasty.outcomes(data, rows, "pil")
    assert counts == {"readable": 152, "refused": 48, "unexpected": 0, "largest_difference": 0}


@pytest.mark.parametrize("decoder", DECODERS)
def test_readability_and_pixels(pack, decoder):
    if jpeg.unavailable_reason(decoder):
        pytest.skip(f"{decoder}: {jpeg.unavailable_reason(decoder)}")
    data, rows = pack
    reader = DecodedDataset(data, decoder)
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


def test_decompression_bombs_are_refused_by_their_headers(pack):
    data, rows = pack
    for index, row in enumerate(rows):
        if row["path"] in BOMBS:
            with pytest.raises(CorruptImage, match="pixels|too large"):
                data.image(index)


@pytest.mark.parametrize(
    "workers, jpeg_scaling",
    [(0, True), *(pytest.param(2, scaling, marks=pytest.mark.slow) for scaling in (False, True))],
)
def test_a_batch_of_all_files(pack, workers, jpeg_scaling):
    data, rows = pack
    crops = MultiCrop(global_size=32, local_size=16, local_number=2)
    stream = batches(
        data, crops, batch_size=200, total_steps=2, workers=workers, cache="none", jpeg_scaling=jpeg_scaling
    )
    first, second = stream
    damaged = {row["path"] for row in rows if not readable(row)}
    assert set(stream.corrupt) == damaged and stream.seen == 400 and stream.replaced == 2 * len(damaged)
    assert torch.equal(first.index.sort().values, torch.arange(200)) and not torch.equal(
        first.global_crops, second.global_crops
    )
    plain = next(batches(data, crops, batch_size=200, total_steps=1, cache="none", jpeg_scaling=jpeg_scaling))
    assert torch.equal(plain.global_crops, first.global_crops) and torch.equal(plain.local_crops, first.local_crops)


def test_orientations_of_one_photograph_agree(pack):
    """Compare hopper_orientation_2..8.jpg, one photograph stored in seven orientations."""
    data, rows = pack
    images = [
        data.image(index).float()
        for index, row in enumerate(rows)
        if "hopper_orientation_" in row["path"] and row["path"].endswith(".jpg")
    ]
    assert len(images) == 7
    for other in images[1:]:
        assert (images[0] - other).abs().mean() < 6
        assert (images[0] - other.flip(2)).abs().mean() > 30


@pytest.mark.parametrize("channels, bits", [(1, 8), (1, 16), (3, 16), (4, 8)])
def test_other_channels_give_tensors_or_corrupt_images(pack, channels, bits):
    data, rows = pack
    read = 0
    for row in rows:
        try:
            image = multichannel.decode(data.root / row["path"], row["path"], channels, bits)
        except CorruptImage as error:
            assert "\n" not in str(error)
            continue
        assert (
            image.shape[0] == channels
            and image.numel()
            and image.dtype == (torch.uint16 if bits == 16 else torch.uint8)
        )
        assert readable(row), row["path"]
        read += 1
    assert read > (140 if channels < 4 else 20)

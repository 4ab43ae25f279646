"""Every file ends as an RGB uint8 tensor or as a CorruptImage with a reason."""

import csv
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.decode import CorruptImage, decode


def encoded(image, form="PNG", **options):
    held = io.BytesIO()
    image.save(held, form, **options)
    return held.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def test_rgb_is_exact(pixels, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(pixels)))
    for source in (path, str(path), path.read_bytes()):
        image = decode(source)
        assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 7, 5)
        assert np.array_equal(image.numpy(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes(mode, pixels):
    source = Image.fromarray(pixels).convert("L").convert("LA") if mode == "LA" else Image.fromarray(pixels).convert(mode)
    image = decode(encoded(source, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(source.convert("RGB")))


def test_sixteen_bits_keep_the_high_byte():
    deep = (np.arange(35, dtype=np.uint16) * 1800).reshape(7, 5)
    image = decode(encoded(Image.fromarray(deep)))
    assert np.array_equal(image[0].numpy(), (deep >> 8).astype(np.uint8)) and torch.equal(image[0], image[2])


def test_transparent_palette_makes_no_warning(pixels, recwarn):
    source = Image.fromarray(pixels).convert("P")
    decode(encoded(source, transparency=bytes(range(256))))
    assert not recwarn.list


def test_orientation_is_left_alone(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert tuple(decode(encoded(Image.fromarray(pixels), "JPEG", exif=exif)).shape) == (3, 7, 5)


def test_damage_is_named(pixels, tmp_path):
    whole = encoded(Image.fromarray(np.repeat(np.repeat(pixels, 20, 0), 20, 1)), "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    for source, name in ((cut, str(cut)), (b"", "image"), (b"not an image", "image"), (tmp_path / "gone.png", "gone.png")):
        with pytest.raises(CorruptImage) as caught:
            decode(source)
        assert caught.value.name.endswith(name) and caught.value.reason and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.name, copy.reason) == (caught.value.name, caught.value.reason)


def test_decompression_bombs_are_refused(monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(CorruptImage, match="(?i)bomb"):
        decode(encoded(Image.fromarray(pixels)))
    monkeypatch.undo()
    assert Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore")
def test_nasty_files():
    packs = pytest.importorskip("packs")
    folder = packs.unpack("nasty")
    folder = next(path.parent for path in [*folder.glob("expectations.csv"), *folder.glob("*/expectations.csv")])
    read = 0
    for row in csv.DictReader(open(folder / "expectations.csv", newline="")):
        try:
            image = decode(folder / row["path"])
        except CorruptImage as error:
            assert error.reason
            continue
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel()
        read += 1
    assert read > 20

"""Every file gives an RGB uint8 tensor or a CorruptImage with a reason."""

import io
import pickle

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps

from maskwise.data.decoding import multichannel
from maskwise.data.decoding.image import CorruptImage, decode

# Pillow before 13 cannot read the TIFF of YCbCr that it writes
OWN_YCBCR = pytest.param(
    "YCbCr", marks=pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow before 13")
)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", OWN_YCBCR])
def test_modes(mode, pixels):
    source = (
        Image.fromarray(pixels).convert("L").convert("LA") if mode == "LA" else Image.fromarray(pixels).convert(mode)
    )
    image = decode(encoded(source, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(source.convert("RGB")))


def test_sixteen_bits_keep_the_high_byte():
    deep = (np.arange(35, dtype=np.uint16) * 1800).reshape(7, 5)
    image = decode(encoded(Image.fromarray(deep)))
    assert np.array_equal(image[0].numpy(), (deep >> 8).astype(np.uint8)) and torch.equal(image[0], image[2])


def test_transparent_palette_gives_no_warning(pixels, recwarn):
    source = Image.fromarray(pixels).convert("P")
    decode(encoded(source, transparency=bytes(range(256))))
    assert not recwarn.list


def with_orientation(image, form, value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(image, form, exif=exif)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", [*range(10), 255])
def test_orientation_is_honored(pixels, form, value):
    data = with_orientation(Image.fromarray(pixels), form, value)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.array(ImageOps.exif_transpose(stored))  # an unknown orientation leaves the stored pixels
        raw = np.array(stored)
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)
    if form != "TIFF":  # Pillow rotates TIFFs itself
        assert np.array_equal(decode(data, upright=False).permute(1, 2, 0).numpy(), raw)
    assert expected.shape == ((5, 7, 3) if 5 <= value <= 8 else (7, 5, 3))


def test_broken_exif_does_not_make_an_image_unreadable(pixels):
    whole = encoded(Image.fromarray(pixels), "JPEG")
    segment = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)
    data = whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]
    assert torch.equal(decode(data), decode(whole))


def test_tiffs_of_twelve_bits_and_floats_fill_the_range(pixels):
    deep = (np.arange(35, dtype=np.uint16) * 117).reshape(7, 5)
    from maskwise.imaging.pil import wide

    image = Image.fromarray(deep)
    image.tag_v2 = {258: (12,)}
    assert np.array_equal(wide(image), deep << 4)
    for values in (np.linspace(0, 1, 35), np.linspace(0, 255, 35)):
        result = decode(encoded(Image.fromarray(values.astype(np.float32).reshape(7, 5)), "TIFF"))
        assert np.abs(result[0].numpy().astype(float) - np.linspace(0, 255, 35).reshape(7, 5)).max() <= 0.51
    odd = np.array([[np.nan, np.inf, -np.inf, -1, 0.5]], dtype=np.float32)
    assert decode(encoded(Image.fromarray(odd), "TIFF"))[0, 0].tolist() == [0, 0, 0, 0, 128]


def test_formats_that_start_programs_are_refused(monkeypatch, tmp_path):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: pytest.fail("Ghostscript was started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch x) (w) file\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(CorruptImage, match="not an image in a format that can be read"):
        decode(data)


@pytest.mark.parametrize("module", [decode, multichannel.decode])
@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "a git-lfs pointer, not the image: run git lfs",
        ),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page, not an image: download it again"),
        (b"\x89PNG but not really", "not an image in a format that can be read"),
    ],
)
def test_files_that_are_no_images_are_named(module, data, reason):
    options = {} if module is decode else {"channels": 1}
    with pytest.raises(CorruptImage) as caught:
        module(data, "a.png", **options)
    assert caught.value.reason.startswith(reason)


def test_a_reason_holds_no_address_in_memory():
    error = CorruptImage.because("a.png", OSError(f"cannot read {io.BytesIO(b'')!r}"))
    assert error.reason == "cannot read"


def test_an_image_of_too_many_pixels_is_refused_by_its_header(pixels, monkeypatch):
    data = encoded(Image.fromarray(pixels))
    assert decode(data, max_pixels=35).shape == (3, 7, 5)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were asked for"))
    with pytest.raises(CorruptImage, match="5 x 7 pixels are more than data.max_pixels=34"):
        decode(data, max_pixels=34)


def test_a_jpeg_of_too_many_scans_is_refused():
    import time

    whole = encoded(Image.new("L", (2000, 2000), 100), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    data = whole[:last] + whole[last:-2] * 2000 + whole[-2:]
    begin = time.perf_counter()
    with pytest.raises(CorruptImage, match="20.. scans over 2000 x 2000 pixels"):
        decode(data)
    assert time.perf_counter() - begin < 1
    few = whole[:last] + whole[last:-2] * 20 + whole[-2:]
    assert decode(few).shape == (3, 2000, 2000)


def test_damage_has_a_reason(pixels, tmp_path):
    whole = encoded(Image.fromarray(np.repeat(np.repeat(pixels, 20, 0), 20, 1)), "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    for source, name in (
        (cut, str(cut)),
        (b"", "image"),
        (b"not an image", "image"),
        (tmp_path / "gone.png", "gone.png"),
    ):
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

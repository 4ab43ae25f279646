"""Images as displayed: EXIF orientation against Pillow, 16-bit and float values, upright input of an encoder."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from maskwise.imaging.pil import eight_bits, opened, orientation, to_rgb, turned


def sideways(value, mode="RGB"):
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = value
    held = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(held, "PNG", exif=exif)
    return Image.open(held)


@pytest.mark.parametrize("value", range(10))
def test_orientation_equals_pillow(value):
    image = sideways(value)
    assert np.array_equal(turned(np.array(image), orientation(image)), np.array(ImageOps.exif_transpose(image)))
    assert turned(np.zeros((2, 3, 4)), value).shape == ((3, 2, 4) if value in (5, 6, 7, 8) else (2, 3, 4))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_encoder_transform_applies_orientation(mode):
    from maskwise.nn.transform import Transform

    transform = Transform((16, 16), 0.875, (0.0,) * 3, (1.0,) * 3)
    image = sideways(6, mode)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    assert torch.equal(transform(image), transform(upright))
    assert torch.equal(transform(image), transform(torch.from_numpy(np.array(upright)).permute(2, 0, 1)))


def test_wide_and_float_pictures():
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(deep)))[..., 0].tolist() == [[0, 0, 1, 255]]
    assert eight_bits(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255] and eight_bits(
        np.array([0.0, 0.5, 200.0, 300.0])
    ).tolist() == [0, 0, 200, 255]
    assert eight_bits(np.zeros(0)).tolist() == []


def test_only_formats_decoded_inside_the_process():
    with pytest.raises(Image.UnidentifiedImageError):
        opened(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"))

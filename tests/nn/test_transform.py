"""Evaluation transform: every kind of image gives the pixels of DINO's torchvision pipeline, or one line."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from maskwise.errors import UserError
from maskwise.imaging.tensors import luma, to_tensor
from maskwise.nn.transform import Transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SQUARE = Transform((32, 32), 0.875, MEAN, STD)
GRAY = Transform((32, 32), 0.875, (0.5,), (0.25,))
RGB = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(RGB).permute(2, 0, 1).contiguous()


def smooth():
    """Return an image without sharp edges, where resampling clips nothing."""
    rows, columns = np.mgrid[:50, :71] / 10
    return np.stack([128 + 90 * np.sin(rows + columns * k) for k in (0.5, 1, 2)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("size", [(280, 200), (200, 280), (301, 255), (64, 65), (50, 71), (400, 90)])
def test_pixels_are_those_of_dinos_evaluation(size):
    """Compare with Resize(37, bicubic) and CenterCrop(32) of a PIL image: only the rounding of resampling differs."""
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(37, interpolation=bicubic), transforms.CenterCrop(32)])(image)
    cropped = SQUARE.crop(image)
    assert cropped.dtype == torch.uint8 and cropped.shape == (3, 32, 32)
    assert (cropped.int() - torch.from_numpy(np.array(reference)).permute(2, 0, 1).int()).abs().max() <= 1
    torch.testing.assert_close(SQUARE(image)[0], (cropped[0].float() / 255 - 0.485) / 0.229)


def test_black_in_normalized_units():
    black = SQUARE(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert black[:, 0, 0].tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=5e-5)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        RGB[:, ::-1][:, ::-1],  # negative strides
        np.concatenate([RGB, RGB[..., :1]], axis=2),  # alpha is dropped
        RGB.transpose(2, 0, 1),
        torch.cat([TENSOR, TENSOR[:1]]),
    ],
    ids=["pil", "array", "view", "rgba array", "channels first", "rgba tensor"],
)
def test_every_kind_of_color_image_gives_the_same_pixels(image):
    assert torch.equal(SQUARE(image), SQUARE(TENSOR))


def test_a_batch_of_tensors():
    assert torch.equal(SQUARE(torch.stack([TENSOR, TENSOR.flip(-1)]))[0], SQUARE(TENSOR))


def test_gray_images_are_repeated():
    gray = RGB[..., 0]
    expected = SQUARE(Image.fromarray(gray))
    for image in (gray, gray[..., None], torch.from_numpy(gray), torch.from_numpy(gray)[None]):
        assert torch.equal(SQUARE(image), expected)
    assert torch.equal(SQUARE.crop(gray)[0], SQUARE.crop(gray)[2])


def test_one_channel_takes_the_luma_of_colors_as_pillow_does():
    expected = GRAY(Image.fromarray(RGB).convert("L"))
    for image in (Image.fromarray(RGB), RGB, TENSOR, Image.fromarray(RGB).convert("RGBA")):
        assert torch.equal(GRAY(image), expected)
    assert torch.equal(luma(TENSOR)[0], torch.from_numpy(np.array(Image.fromarray(RGB).convert("L"))))
    floats = GRAY(TENSOR / 255)
    assert (floats - expected).abs().max() < 2 / 255 / 0.25


def test_sixteen_bits_are_scaled_not_clipped():
    gray = RGB[..., 0]
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    for transform in (GRAY, SQUARE):
        assert torch.equal(transform(wide), transform(gray))
    assert torch.equal(GRAY.crop(gray.astype(np.uint16)), GRAY.crop(torch.from_numpy(gray.astype(np.uint16))))
    gray = smooth()[..., 0]
    assert (GRAY(gray.astype(np.uint16) * 257) - GRAY(gray)).abs().max() < 1.01 / 255 / 0.25


def test_floats_are_in_0_to_1():
    pixels = smooth()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (tensor / 255, (tensor / 255).double(), pixels / 255, (pixels / 255).astype(np.float32)):
        assert SQUARE(image).dtype == torch.float32
        assert (SQUARE(image) - SQUARE(tensor)).abs().max() < 2.01 / 255 / 0.224  # uint8 is rounded twice
    step = torch.zeros(1, 40, 40)
    step[..., 20:] = 1  # bicubic weights overshoot at the edge
    assert GRAY.crop(step).min() == 0 and GRAY.crop(step).max() == 1


@pytest.mark.parametrize(
    "image, words",
    [
        ("photo.jpg", "this is a str: open the file with PIL.Image.open"),
        ([RGB], "this is a list: convert it"),
        (TENSOR.float(), "holds values in 0..1; this one has 0 to 255: give uint8"),
        (SQUARE(TENSOR), "holds values in 0..1; this one has -"),
        (torch.full((3, 40, 40), float("nan")), "holds values in 0..1; this one has nan"),
        (TENSOR.long(), r"this one is torch.int64: give image.to\(torch.uint8\)"),
        (RGB.astype(int), r"this one is \[50, 71, 3\] of int64"),
        (RGB[None], r"this one is \[1, 50, 71, 3\] of uint8"),
        (torch.from_numpy(RGB), r"takes images \[3, H, W\]; this one is \[50, 71, 3\]: give image.permute\(2, 0, 1\)"),
        (TENSOR[:2], r"takes images \[3, H, W\]; this one is \[2, 50, 71\]$"),
        (RGB[..., :2], r"takes images \[3, H, W\]; this one is \[50, 71, 2\]$"),
        (TENSOR[:, :0], "not empty"),
    ],
)
def test_other_images_are_refused_in_one_line(image, words):
    with pytest.raises(UserError, match=words) as caught:
        SQUARE(image)
    assert "\n" not in str(caught.value)


def test_other_numbers_of_channels():
    five = Transform((32, 32), 0.875, (0.5,) * 5, (0.2,) * 5)
    bands = np.random.default_rng(0).integers(0, 256, (40, 50, 5), dtype=np.uint8)
    assert torch.equal(five(bands), five(bands.transpose(2, 0, 1)))
    with pytest.raises(UserError, match=r"5 channels; give tensors \[5, H, W\] instead of PIL images"):
        five(Image.fromarray(RGB))
    assert to_tensor(Image.fromarray(RGB).convert("RGBA"), 4).shape == (4, 50, 71)


def test_crop_pct_is_a_share():
    for crop_pct in (0, -1, 1.5):
        with pytest.raises(UserError, match="crop_pct=.* is not a share"):
            Transform((32, 32), crop_pct, MEAN, STD)

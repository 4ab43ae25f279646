"""transformers' part of an export: AutoImageProcessor gives the pixels of timm and of maskwise."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from export.folder.test_folder import build
from maskwise.export import write
from maskwise.export.folder import verify
from maskwise.imaging.resize import resize_image
from maskwise.imaging.tensors import to_tensor

SIZES = [(280, 200), (200, 280), (255, 301), (301, 255), (64, 65), (500, 333), (333, 500), (37, 53), (20, 90)]


PROCESSORS = {
    "dinov2": ("cls", {}, "BitImageProcessor"),
    "registers": ("cls", {"reg_tokens": 2}, "BitImageProcessor"),
    "timm wrapper": ("simpool", {"class_token": False}, "BitImageProcessor"),
    "one channel": ("cls", {"mean": (0.4,), "std": (0.3,)}, "BitImageProcessor"),
    "oblong": ("cls", {"image_size": (32, 48)}, "TimmWrapperImageProcessor"),
    "other crop": ("cls", {"crop_pct": 0.9}, "BitImageProcessor"),  # 32 / .9 = 35.6: timm alone would cut that to 35
}


def photo(height, width, seed=0):
    """Return an image of that size with sharp edges, where a shift of one pixel shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.NEAREST)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_equal_in_the_three_libraries(tmp_path, kind):
    """To two gray levels; transformers rounds half a pixel of the crop's margin down, the others to even."""
    transformers = pytest.importorskip("transformers")
    from timm.data import create_transform, resolve_model_data_config

    pooling, options, processor_name = PROCESSORS[kind]
    encoder = build(pooling, **{key: value for key, value in options.items() if key != "crop_pct"})
    encoder.crop_pct = options.get("crop_pct", encoder.crop_pct)
    write.write(encoder, tmp_path / "out")
    timms = create_transform(**resolve_model_data_config(verify.open_timm(tmp_path / "out")), is_training=False)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == processor_name
    std, shifted = torch.tensor(encoder.std).view(-1, 1, 1), 0
    for size in SIZES:
        image = photo(*size) if len(encoder.mean) == 3 else photo(*size).convert("L")
        expected = encoder.transform(image)
        margins = [a - b for a, b in zip(encoder.transform.resized_size(size), encoder.image_size)]
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert ((timms(image) - expected) * std * 255).abs().max() < 2.01, size
        is_shifted = processor_name == "BitImageProcessor" and any(margin % 4 == 3 for margin in margins)
        shifted += is_shifted
        if is_shifted:
            expected = floored(encoder, image)
        assert ((theirs - expected) * std * 255).abs().max() < 2.01, size
    assert shifted in ((0,) if processor_name.startswith("Timm") else range(1, len(SIZES)))


def floored(encoder, image):
    """Return the transform with the crop's margins rounded down."""
    transform = encoder.transform
    resized = resize_image(to_tensor(image, len(encoder.mean)), transform.resized_size(image.size[::-1]))
    top, left = ((side - crop) // 2 for side, crop in zip(resized.shape[-2:], encoder.image_size))
    cropped = resized[:, top : top + encoder.image_size[0], left : left + encoder.image_size[1]]
    return (cropped / 255 - torch.tensor(encoder.mean).view(-1, 1, 1)) / torch.tensor(encoder.std).view(-1, 1, 1)


def test_gray_and_transparent_images_pass_the_processor(tmp_path):
    transformers = pytest.importorskip("transformers")
    for pooling in ("cls", "simpool"):
        encoder = build(pooling)
        write.write(encoder, tmp_path / pooling)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / pooling)
        for mode in ("L", "RGBA", "P", "1"):
            image = photo(40, 40).convert(mode)
            theirs = processor(image, return_tensors="pt")["pixel_values"][0]
            assert (theirs - encoder.transform(image)).abs().max() < 0.04, mode


def test_the_processor_of_one_channel_stays_gray(tmp_path):
    write.write(build(mean=(0.4,), std=(0.3,)), tmp_path / "out")
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["do_convert_rgb"] is False and processor["image_mean"] == [0.4]

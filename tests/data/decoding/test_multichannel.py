"""Images of one, four and many channels and of sixteen bits, from file to step."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.augmentation import color
from maskwise.data.datasets.folder import Folder
from maskwise.data.decoding import multichannel
from maskwise.data.decoding.multichannel import CorruptImage
from maskwise.data.multicrop import MultiCrop
from maskwise.imaging.resize import resize_image


def wide(shape=(6, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 65536, shape).astype(np.uint16)


def test_sixteen_bit_gray_is_exact(tmp_path):
    pixels = wide()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = multichannel.decode(tmp_path / "a.png", channels=1, bits=16)
    assert image.dtype == torch.uint16 and np.array_equal(image[0].numpy(), pixels)
    assert np.array_equal(multichannel.decode(tmp_path / "a.png", channels=1)[0].numpy(), pixels >> 8)
    three = multichannel.decode(tmp_path / "a.png", channels=3, bits=16)
    assert three.shape == (3, 6, 8) and np.array_equal(three[2].numpy(), pixels)


def test_eight_bits_are_widened_and_colors_become_luma(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8))
    picture.save(tmp_path / "a.png")
    assert np.array_equal(
        multichannel.decode(tmp_path / "a.png", channels=1)[0].numpy(), np.asarray(picture.convert("L"))
    )
    assert np.array_equal(
        multichannel.decode(tmp_path / "a.png", bits=16).numpy(),
        np.asarray(picture).transpose(2, 0, 1).astype(int) * 257,
    )
    buffer = io.BytesIO()
    picture.convert("RGBA").save(buffer, "PNG")
    assert multichannel.decode(buffer.getvalue(), channels=4).shape == (4, 6, 8)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_arrays_of_many_channels(tmp_path, layout):
    pixels = wide((6, 8, 5))
    np.save(tmp_path / "a.npy", pixels if layout == "HWC" else pixels.transpose(2, 0, 1))
    image = multichannel.decode(tmp_path / "a.npy", channels=5, bits=16)
    assert image.shape == (5, 6, 8) and np.array_equal(image.numpy(), pixels.transpose(2, 0, 1))
    assert multichannel.decode((tmp_path / "a.npy").read_bytes(), channels=5).dtype == torch.uint8


def test_pages_of_a_tiff_are_bands(tmp_path):
    pages = [Image.fromarray(wide(seed=k)) for k in range(6)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    image = multichannel.decode(tmp_path / "a.tif", channels=6, bits=16)
    assert image.shape == (6, 6, 8) and np.array_equal(image[5].numpy(), wide(seed=5))


def test_wrong_channels_and_types_are_corrupt_images(tmp_path):
    np.save(tmp_path / "a.npy", wide((6, 8, 5)))
    np.save(tmp_path / "f.npy", np.zeros((4, 4)))
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name, channels, words in (
        ("a.npy", 4, "5 channels, but data.mean has 4"),
        ("f.npy", 5, "array of float64"),
        ("o.npy", 5, "Python objects"),
        ("a.png", 5, "3 channels, but data.mean has 5"),
        ("gone.npy", 5, "No such file"),
    ):
        with pytest.raises(CorruptImage, match=words):
            multichannel.decode(tmp_path / name, channels=channels)


def test_array_folders(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        np.save(tmp_path / label / "x.npy", wide((9, 9, 5)))
        Image.new("RGB", (4, 4)).save(tmp_path / label / "y.png")
    assert len(Folder(tmp_path)) == 2  # arrays count as images only for other channels or bits
    data = Folder(tmp_path, channels=5, bits=16)
    assert len(data) == 4 and data.image(0).shape == (5, 9, 9) and data.image(0).dtype == torch.uint16


@pytest.mark.parametrize("channels, kind", [(1, torch.uint8), (5, torch.uint8), (5, torch.uint16), (3, torch.uint16)])
def test_crops_keep_channels_and_bits(channels, kind):
    top = torch.iinfo(kind).max
    pixels = (torch.rand(channels, 40, 50, generator=torch.Generator().manual_seed(0)) * top).to(torch.int32)
    crops = MultiCrop(global_size=32, local_size=16, local_number=2)
    twice = [pixels.to(kind), pixels.to(kind)]
    first, local, params = crops.batch(twice, [3, 4], 0)
    assert (
        first.shape == (4, channels, 32, 32)
        and local.shape == (4, channels, 16, 16)
        and first.dtype == local.dtype == kind
    )
    boxes, flips = crops.boxes(crops.sample_uniforms(torch.tensor([3, 4]), 0), [(40, 50)] * 2)
    for view in range(2):
        for i in range(2):
            y, x, h, w = boxes[i, view].tolist()
            exact = torch.nn.functional.interpolate(
                pixels[None, :, y : y + h, x : x + w].double(), size=(32, 32), mode="bicubic", antialias=True
            )[0].clamp(0, top)
            apart = ((exact.flip(-1) if flips[i, view] else exact) - first[2 * view + i].double()).abs()
            # 8-bit values are rounded and clipped between the two passes.
            assert apart.max() <= (1 if kind == torch.uint16 else 32) and apart.mean() < 2
    augmented = color.augment(first, params.global_, [0.5] * channels, [0.25] * channels)
    assert augmented.dtype == torch.float32 and augmented.shape == first.shape and augmented.isfinite().all()
    assert augmented.min() >= -2 and augmented.max() <= 2


def test_without_jitter_values_are_only_normalized():
    image = torch.from_numpy(wide((5, 32, 32)))
    crops, _, params = MultiCrop(
        global_size=32,
        local_size=16,
        local_number=0,
        jitter_prob=0.0,
        gray_prob=1.0,
        blur_prob=(0, 0, 0),
        solarize_prob=0.0,
    ).batch([image], [0], 0)
    augmented = color.augment(crops, params.global_, (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.6, 0.7, 0.8, 0.9))
    expected = (crops.double() / 65535 - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(-1, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7, 0.8, 0.9]
    ).view(-1, 1, 1)
    torch.testing.assert_close(augmented, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", ["brightness", "contrast", "blur", "solarize"])
def test_one_band_agrees_with_gray_rgb(op):
    """Compare an operation on one band with the same operation on gray RGB, up to rounding."""
    image = torch.randint(0, 256, (1, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    chance = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": (0, 0, 0), "solarize_prob": 0.0}
    chance.update({"blur": {"blur_prob": (1, 1, 1)}, "solarize": {"solarize_prob": 1.0}}.get(op, {"jitter_prob": 1.0}))
    jitter = {"brightness": (0.6, 0, 0, 0), "contrast": (0, 0.6, 0, 0)}.get(op, (0, 0, 0, 0))
    crops = MultiCrop(global_size=24, local_size=8, local_number=0, jitter=jitter, **chance)
    one, _, params = crops.batch([image], [5], 0)
    three, *_ = crops.batch([image.expand(3, -1, -1)], [5], 0)
    a = color.augment(one, params.global_, [0.0], [1.0])
    b = color.augment(three, params.global_, [0.0] * 3, [1.0] * 3)[:, :1]
    assert (a - b).abs().max() * 255 <= 1.6
    assert not torch.equal(a[1], one[1].float() / 255)


def test_message_about_skipped_operations():
    assert color.skipped_operations(3) is None
    assert color.skipped_operations(5).startswith(
        "images of 5 channels: saturation, hue and gray need RGB and are left out"
    )


def test_sixteen_bits_are_resized():
    image = torch.from_numpy(wide((2, 20, 20)))
    small = resize_image(image, (10, 10))
    assert small.dtype == torch.uint16
    exact = torch.nn.functional.interpolate(image[None].float(), size=(10, 10), mode="bicubic", antialias=True)[
        0
    ].clamp(0, 65535)
    assert (small.double() - exact.double()).abs().max() <= 0.51


def test_five_bands_of_sixteen_bits_train_and_are_evaluated(tmp_path):
    from maskwise import api, build, load
    from maskwise.recipe.reading import read_recipe

    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for k in range(count):
                np.save(tmp_path / split / label / f"{k}.npy", rng.integers(0, 65536, (40, 40, 5)).astype(np.uint16))
    recipe = read_recipe(
        "debug/tiny",
        "data.name=folder",
        f"data.path={tmp_path}",
        "data.split=train",
        "data.test_split=val",
        "data.bits=16",
        "train.epochs=1",
        "data.mean=[.5,.5,.5,.5,.5]",
        "data.std=[.2,.2,.2,.2,.2]",
        "teacher.warmup_temp_epochs=0",
        "optimizer.warmup_epochs=0",
        "evaluate.k=[1]",
    )
    assert build.train(recipe, tmp_path / "run", quiet=True)["status"] == "complete"
    encoder = load(tmp_path / "run")
    assert encoder.mean == (0.5,) * 5 and encoder(
        encoder.transform(torch.from_numpy(wide((5, 50, 60))))[None]
    ).pooled.shape == (1, 48)
    report = api.evaluate("knn", encoder, train=tmp_path / "train", test=tmp_path / "val", k=[1])
    assert report.numbers

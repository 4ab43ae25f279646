"""Color operations against Pillow with equal parameters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from maskwise.data.augmentation.color import (
    augment,
    blur,
    brightness,
    contrast,
    gray,
    hue,
    recolor,
    saturation,
    solarize,
)
from maskwise.data.batch import ColorParams, box_reach
from maskwise.data.multicrop import MultiCrop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def synthetic():
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:96, :96]
    pictures = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(4)]
    for _ in range(46):
        f, g = rng.uniform(-0.3, 0.3, (2, 3, 1, 1))
        field = 127 + 110 * np.sin(f * x + g * y + rng.uniform(0, 6, (3, 1, 1))) + 50 * ((x // 8 + y // 12) % 2)
        pictures.append(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return pictures


def photographs():
    packs = pytest.importorskip("packs")
    files = sorted(packs.unpack("imagenette224-core").rglob("*.JPEG"))
    return [np.array(Image.open(file).convert("RGB").resize((160, 160))) for file in files[:: len(files) // 50][:50]]


@pytest.fixture(scope="module", params=[synthetic, photographs], ids=["synthetic", "photographs"])
def pictures(request):
    return [Image.fromarray(pixels) for pixels in request.param()]


def stacked(images):
    return (
        torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
        .permute(0, 3, 1, 2)
        .float()
        .contiguous()
    )


def gap(ours, theirs):
    return (ours - stacked(theirs)).abs()


def shifted_hue(image, turns):
    """Shift the hue as torchvision's v1 adjust_hue does on a Pillow image."""
    h, s, v = image.convert("HSV").split()
    moved = (np.array(h).astype(np.int64) + int(turns * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), s, v)).convert("RGB")


PILLOW = {
    "brightness": lambda image, a: ImageEnhance.Brightness(image).enhance(a),
    "contrast": lambda image, a: ImageEnhance.Contrast(image).enhance(a),
    "saturation": lambda image, a: ImageEnhance.Color(image).enhance(a),
    "hue": shifted_hue,
}


@pytest.mark.parametrize("op, low, high", [(brightness, 0, 2), (contrast, 0, 2), (saturation, 0, 2), (hue, -0.5, 0.5)])
def test_jitter_operations(pictures, op, low, high):
    factors = torch.linspace(low, high, len(pictures))
    ours = op(stacked(pictures), factors.view(-1, 1, 1, 1))
    assert gap(ours, [PILLOW[op.__name__](image, float(a)) for image, a in zip(pictures, factors)]).max() <= 2


def test_gray_and_solarize(pictures):
    images = stacked(pictures)
    assert gap(gray(images).expand_as(images), [image.convert("L") for image in pictures]).max() == 0
    assert gap(solarize(images), [ImageOps.solarize(image, 128) for image in pictures]).max() == 0


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.2, 2.0, 3.3])
def test_blur(pictures, sigma):
    sigmas = torch.full((len(pictures),), sigma)
    ours = blur(stacked(pictures), sigmas, box_reach(sigma))
    assert gap(ours, [image.filter(ImageFilter.GaussianBlur(sigma)) for image in pictures]).max() <= 2


def test_blur_is_independent_per_image_and_accepts_oblong_images():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 20, 33))).float()
    sigmas = torch.linspace(0.1, 2.0, 6)
    ours = blur(images, sigmas, box_reach(2.0))
    for k in range(6):
        assert torch.equal(ours[k : k + 1], blur(images[k : k + 1], sigmas[k : k + 1], box_reach(2.0)))
        picture = Image.fromarray(images[k].permute(1, 2, 0).numpy().astype(np.uint8))
        assert gap(ours[k : k + 1], [picture.filter(ImageFilter.GaussianBlur(float(sigmas[k])))]).max() <= 2


def chain(image, colors, row):
    """Apply the published order of operations to a Pillow image."""
    if colors.jitter[row]:
        for place in colors.order[row].tolist():
            name = list(PILLOW)[place]
            image = PILLOW[name](image, float(colors.factors[row, place]))
    if colors.gray[row]:
        image = image.convert("L").convert("RGB")
    if colors.sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(colors.sigma[row])))
    if colors.solarize[row]:
        image = ImageOps.solarize(image, 128)
    return image


def test_whole_chain(pictures):
    crops = MultiCrop(global_size=64, local_size=32, local_number=2, solarize_prob=0.5, seed=2)
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures]
    samples = torch.arange(len(images))
    global_crops, local_crops, params = crops.batch(images, samples, epoch=0)
    boxes, flips = crops.boxes(crops.sample_uniforms(samples, 0), [image.shape[1:] for image in images])
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for views, colors, first, size in ((global_crops, params.global_, 0, 64), (local_crops, params.local_, 2, 32)):
        out = augment(views, colors, MEAN, STD)
        assert out.dtype == torch.float32 and out.shape == views.shape
        ours, theirs = (out * std + mean) * 255, []
        for row in range(len(views)):
            view, i = divmod(row, len(images))
            top, left, h, w = boxes[i, first + view].tolist()
            crop = pictures[i].crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
            crop = crop.transpose(Image.FLIP_LEFT_RIGHT) if flips[i, first + view] else crop
            theirs.append(chain(crop, colors, row))
        assert gap(ours, theirs).mean() <= 1.0


def untouched(count):
    return ColorParams(
        torch.zeros(count, dtype=torch.bool),
        torch.ones(count, 4),
        torch.arange(4).repeat(count, 1),
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count),
        torch.zeros(count, dtype=torch.bool),
    )


def test_normalization_alone():
    crops = torch.tensor([0, 255, 128], dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 3, 4, 4)
    out = augment(crops, untouched(3), MEAN, STD)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), atol=5e-5)  # (0 - mean) / std
    expected = (crops[2, :, 0, 0] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(out[2, :, 0, 0], expected, atol=1e-6)
    assert crops.max() == 255


def test_only_chosen_rows_change_and_rows_are_independent():
    rng = np.random.default_rng(1)
    crops = torch.from_numpy(rng.integers(0, 256, (12, 3, 16, 16), dtype=np.uint8))
    colors = MultiCrop(global_size=16, local_number=4).colors(torch.arange(2), 0)
    out = recolor(crops, colors)
    for row in range(12):
        assert torch.equal(out[row : row + 1], recolor(crops[row : row + 1], colors[row : row + 1]))
    one_gray = untouched(12)
    one_gray.gray[5] = True
    out = recolor(crops, one_gray)
    changed = (out != crops).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [5]


def test_no_rows():
    assert augment(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), untouched(0), MEAN, STD).shape == (0, 3, 8, 8)


@pytest.mark.gpu
def test_device_agrees():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    crops = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))
    colors = MultiCrop(local_number=0).colors(torch.arange(32), 0)
    on_cpu, on_gpu = (
        recolor(crops, colors),
        recolor(crops.cuda(), colors.with_plan().map_tensors(lambda t: t.cuda())).cpu(),
    )
    assert (on_cpu - on_gpu).abs().mean() < 0.05

"""Geometry: crops against Pillow, boxes against a loop, every drawn parameter against its distribution."""

import math

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from maskwise.data.multicrop import MultiCrop, channels_last, resized_crop
from maskwise.functional.errors import UserError

DRAWS = 5000


def synthetic(count=50, size=(97, 131)):
    """Smooth fields with edges and some noise: uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: size[0], : size[1]]
    pictures = []
    for _ in range(count):
        f, g, phase = rng.uniform(0.02, 0.4, (3, 1, 1)), rng.uniform(0.02, 0.4, (3, 1, 1)), rng.uniform(0, 6, (3, 1, 1))
        field = 127 + 90 * np.sin(f * x + g * y + phase) + 60 * ((x // 16 + y // 24) % 2) - 30 + rng.normal(0, 6, (3, *size))
        pictures.append(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return pictures


def photographs():
    packs = pytest.importorskip("packs")
    files = sorted(packs.unpack("imagenette224-core").rglob("*.JPEG"))
    return [np.array(Image.open(file).convert("RGB")) for file in files[:: len(files) // 50][:50]]


def resized(crop, size):
    """Pillow 13's bicubic resize, also on earlier versions, which take rows first whatever the shape."""
    if int(PIL.__version__.split(".")[0]) < 13 and crop.height > size and 2 * crop.width < crop.height + size:
        crop = crop.resize((crop.width, size), Image.BICUBIC)
    return crop.resize((size, size), Image.BICUBIC)


@pytest.mark.parametrize("source", [synthetic, photographs])
def test_resized_crop_equals_pillow(source):
    rng = np.random.default_rng(0)
    for pixels in source():
        height, width = pixels.shape[:2]
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        for size in (16, 48, 96, 224):
            h, w = rng.integers(8, height + 1), rng.integers(8, width + 1)
            top, left, flip = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), bool(rng.integers(2))
            ours = resized_crop(channels_last(image), (top, left, h, w), flip, torch.empty(1, 3, size, size, dtype=torch.uint8))[0]
            theirs = resized(Image.fromarray(pixels).crop((left, top, left + w, top + h)), size)
            theirs = np.array(theirs.transpose(Image.FLIP_LEFT_RIGHT) if flip else theirs, dtype=float)
            gap = np.abs(ours.permute(1, 2, 0).numpy() - theirs)
            assert gap.max() <= 3 and gap.mean() <= 0.5


def box_by_hand(u, height, width, scale, ratio):
    """The rule of RandomResizedCrop.get_params, one try after another."""
    for k in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[2 * k])
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[2 * k + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_boxes_equal_the_loop():
    crops = MultiCrop(local_number=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    sizes = np.array([[224, 224], [32, 32], [500, 375], [40, 400], [400, 40], [1, 1], [3, 900], [7, 5]] * 20)
    uniforms = crops.geometry(torch.arange(len(sizes)), 0)
    boxes, flips = crops.boxes(uniforms, sizes)
    assert boxes.shape == (160, 4, 4) and flips.shape == (160, 4)
    for i, (height, width) in enumerate(sizes):
        for v in range(4):
            expected = box_by_hand(uniforms[i, v], int(height), int(width), crops.scale[v], crops.ratio)
            assert boxes[i, v].tolist() == expected
            assert flips[i, v] == (uniforms[i, v, 22] < 0.5)
    top, left, h, w = boxes.transpose(2, 0, 1)
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= sizes[:, :1]).all() and (left + w <= sizes[:, 1:]).all()


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov against U(low, high) at p > .001 (asymptotic bound 1.949)."""
    x = (np.sort(np.asarray(values, dtype=float)) - low) / (high - low)
    steps = np.arange(len(x) + 1) / len(x)
    distance = max((steps[1:] - x).max(), (x - steps[:-1]).max())
    assert distance * math.sqrt(len(x)) < 1.949, distance


def assert_shares(counts, shares):
    """Chi-square of counts against shares at p > .001 (Wilson-Hilferty)."""
    counts, shares = np.asarray(counts, dtype=float), np.asarray(shares, dtype=float)
    expected = counts.sum() * shares
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert normal < 3.09, statistic


def assert_probability(hits, p):
    hits = np.asarray(hits)
    assert_shares([hits.sum(), (~hits).sum()], [p, 1 - p])


@pytest.fixture(scope="module")
def drawn():
    crops = MultiCrop(local_number=1, seed=7)
    samples = torch.arange(DRAWS)
    uniforms = crops.geometry(samples, 0)
    return crops, crops.boxes(uniforms, np.full((DRAWS, 2), 4000)), crops.colours(samples, 0)


@pytest.mark.parametrize("view, scale", [(2, (0.05, 0.25))])
def test_distribution_of_boxes(drawn, view, scale):
    (top, left, h, w), flips = drawn[1][0][:, view].T, drawn[1][1][:, view]
    assert_uniform(h * w / 4000**2, *scale)
    assert_uniform(np.log(w / h), math.log(3 / 4), math.log(4 / 3))
    rng = np.random.default_rng(0)  # positions are whole numbers: spread them for a continuous test
    assert_uniform((top + rng.random(DRAWS)) / (4000 - h + 1), 0, 1)
    assert_uniform((left + rng.random(DRAWS)) / (4000 - w + 1), 0, 1)
    assert_probability(flips, 0.5)


def test_distribution_of_global_area():
    crops = MultiCrop(local_number=0, global_scale=(0.25, 0.7))  # all these fit at the first try
    boxes, _ = crops.boxes(crops.geometry(torch.arange(DRAWS), 3), np.full((DRAWS, 2), 4000))
    for view in range(2):
        assert_uniform(boxes[:, view, 2] * boxes[:, view, 3] / 4000**2, 0.25, 0.7)


@pytest.mark.parametrize("view, blurred, solarized", [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_distribution_of_colours(drawn, view, blurred, solarized):
    colours = drawn[2][view * DRAWS:(view + 1) * DRAWS]
    for k, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert_uniform(colours.factors[:, k], low, high)
    assert_probability(colours.jitter.numpy(), 0.8)
    assert_probability(colours.grey.numpy(), 0.2)
    codes = (colours.order * torch.tensor([64, 16, 4, 1])).sum(1).numpy()
    _, counts = np.unique(codes, return_counts=True)
    assert_shares(counts, np.full(24, 1 / 24))
    assert (colours.order.sort(1).values == torch.arange(4)).all()
    on = colours.sigma > 0
    if blurred == 1:
        assert on.all()
    else:
        assert_probability(on.numpy(), blurred)
    assert_uniform(colours.sigma[on], 0.1, 2.0)
    if solarized:
        assert_probability(colours.solarize.numpy(), solarized)
    else:
        assert not colours.solarize.any()


def test_parameters_are_independent_of_each_other(drawn):
    c = drawn[2][DRAWS:2 * DRAWS]
    other = drawn[2][:DRAWS]
    columns = [*c.factors.T, c.jitter, c.grey, c.sigma > 0, c.solarize, c.order[:, 0] == 0, other.factors[:, 0], other.jitter,
               torch.from_numpy(drawn[1][1][:, 1]), torch.from_numpy(drawn[1][0][:, 1, 0])]
    table = np.corrcoef(np.stack([np.asarray(column, dtype=float) for column in columns]))
    assert np.abs(table - np.eye(len(columns))).max() < 4.5 / math.sqrt(DRAWS)


def test_views_are_a_function_of_the_key():
    image = torch.from_numpy(synthetic(1)[0]).permute(2, 0, 1)
    crops = MultiCrop(global_size=48, local_size=24, local_number=4, seed=1)
    first = crops(image, sample=5, epoch=2)
    again = crops(image.contiguous(), sample=5, epoch=2)
    assert tuple(first[0].shape) == (2, 3, 48, 48) and tuple(first[1].shape) == (4, 3, 24, 24)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    fewer = MultiCrop(global_size=48, local_size=24, local_number=2, seed=1)(image, sample=5, epoch=2)
    assert torch.equal(first[0], fewer[0]) and torch.equal(first[1][:2], fewer[1])
    assert torch.equal(first[2].local_.factors[:2], fewer[2].local_.factors)
    for other in (crops(image, sample=6, epoch=2), crops(image, sample=5, epoch=3),
                  MultiCrop(global_size=48, local_size=24, local_number=4, seed=2)(image, sample=5, epoch=2)):
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[2].global_.factors, other[2].global_.factors)
    assert not torch.equal(first[0][0], first[0][1])


def test_a_batch_is_its_samples_crop_major():
    images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in synthetic(3)]
    images[1] = images[1][:, :40, :60]
    crops = MultiCrop(global_size=32, local_size=16, local_number=3)
    global_crops, local_crops, params = crops.batch(iter(images), [9, 4, 7], epoch=1)
    for i, sample in enumerate((9, 4, 7)):
        one = crops(images[i], sample=sample, epoch=1)
        assert torch.equal(global_crops[i::3], one[0]) and torch.equal(local_crops[i::3], one[1])
        for whole, single in ((params.global_, one[2].global_), (params.local_, one[2].local_)):
            for name in ("jitter", "factors", "order", "grey", "sigma", "solarize"):
                assert torch.equal(getattr(whole, name)[i::3], getattr(single, name))


def test_no_local_crops():
    global_crops, local_crops, params = MultiCrop(global_size=8, local_size=4, local_number=0)(torch.zeros(3, 9, 9, dtype=torch.uint8), sample=0, epoch=0)
    assert tuple(local_crops.shape) == (0, 3, 4, 4) and len(params.local_) == 0 and len(params.global_) == 2


@pytest.mark.parametrize("wrong", [dict(global_size=0), dict(local_number=-1), dict(global_scale=(0.5, 1.2)), dict(local_scale=(0.5, 0.1)),
                                   dict(flip=1.5), dict(jitter=(0.4, 0.4, 0.2)), dict(jitter=(0.4, 0.4, 0.2, 0.7)), dict(blur_prob=(1.0, 0.5)),
                                   dict(ratio=(0, 1)), dict(blur_sigma=(0.0, 2.0))])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(UserError) as caught:
        MultiCrop(**wrong)
    assert f"crops.{next(iter(wrong))}" in str(caught.value) and "\n" not in str(caught.value)

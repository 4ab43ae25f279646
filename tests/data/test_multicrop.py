"""Multi-crop: crops against Pillow, boxes against a loop, sampled parameters against their distributions."""

import math

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from maskwise.compat import ready_torchvision
from maskwise.data.multicrop import MultiCrop, channels_last, resized_crop
from maskwise.errors import UserError

DRAWS = 5000


def synthetic(count=50, size=(97, 131)):
    """Generate smooth fields with edges and some noise: uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: size[0], : size[1]]
    pictures = []
    for _ in range(count):
        f, g, phase = rng.uniform(0.02, 0.4, (3, 1, 1)), rng.uniform(0.02, 0.4, (3, 1, 1)), rng.uniform(0, 6, (3, 1, 1))
        field = (
            127
            + 90 * np.sin(f * x + g * y + phase)
            + 60 * ((x // 16 + y // 24) % 2)
            - 30
            + rng.normal(0, 6, (3, *size))
        )
        pictures.append(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return pictures


def photographs():
    packs = pytest.importorskip("packs")
    files = sorted(packs.unpack("imagenette224-core").rglob("*.JPEG"))
    return [np.array(Image.open(file).convert("RGB")) for file in files[:: len(files) // 50][:50]]


def resized(crop, size):
    """Resize as Pillow 13 does, also with earlier versions, which always take rows first."""
    if not is_pillow_13() and crop.height > size and 2 * crop.width < crop.height + size:
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
            ours = resized_crop(
                channels_last(image), (top, left, h, w), flip, torch.empty(1, 3, size, size, dtype=torch.uint8)
            )[0]
            theirs = resized(Image.fromarray(pixels).crop((left, top, left + w, top + h)), size)
            theirs = np.array(theirs.transpose(Image.FLIP_LEFT_RIGHT) if flip else theirs, dtype=float)
            gap = np.abs(ours.permute(1, 2, 0).numpy() - theirs)
            assert gap.max() <= 3 and gap.mean() <= 0.5


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (48, 16), (192, 320)])
def test_crops_that_are_not_square_equal_torchvision(size):
    """The pixels of RandomResizedCrop(size=(h, w)) at the same box: the region's aspect is not that of the crop."""
    ready_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import hflip, resized_crop

    maker = MultiCrop(global_size=size, local_size=(8, 16), local_number=2)
    for sample, pixels in enumerate(synthetic(6)):
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        boxes, flips = maker.boxes(maker.sample_uniforms(torch.tensor([sample]), 0), [image.shape[1:]])
        crops = [crop for part in maker(image, sample=sample, epoch=0)[:2] for crop in part]
        assert [tuple(crop.shape[1:]) for crop in crops] == [size, size, (8, 16), (8, 16)]
        for crop, box, flip in zip(crops, boxes[0].tolist(), flips[0]):
            theirs = resized_crop(Image.fromarray(pixels), *box, crop.shape[1:], InterpolationMode.BICUBIC)
            theirs = np.array(hflip(theirs) if flip else theirs, dtype=float)
            gap = np.abs(crop.permute(1, 2, 0).numpy() - theirs)
            assert gap.max() <= (3 if is_pillow_13() else 12) and gap.mean() <= 0.5


def is_pillow_13():
    """Tell whether Pillow chooses between rows and columns first; earlier versions always take rows."""
    return int(PIL.__version__.split(".")[0]) >= 13


def test_boxes_of_crops_that_are_not_square_are_those_of_torchvision():
    """RandomResizedCrop.get_params, which draws from torch's global stream, given our uniforms."""
    ready_torchvision()
    from torchvision.transforms import RandomResizedCrop

    maker = MultiCrop(global_size=(24, 40), local_number=0)
    uniforms = maker.sample_uniforms(torch.arange(40), 0)
    sizes = [(90, 160), (160, 90), (30, 400), (224, 224)] * 10
    boxes, _ = maker.boxes(uniforms, sizes)
    theirs = RandomResizedCrop((24, 40), scale=(0.25, 1.0))
    assert theirs.size == (24, 40) and tuple(theirs.ratio) == maker.ratio
    for i, size in enumerate(sizes):
        for view in range(2):
            draws = iter(uniforms[i, view])
            expected = params_given(theirs, size, draws, uniforms[i, view, 20:22])
            assert boxes[i, view].tolist() == expected


def params_given(transform, size, draws, place):
    """Run get_params with these uniforms in place of torch's: ten pairs (area, aspect), then (top, left)."""
    place = iter(place)

    def uniform_(tensor, low, high):
        return torch.tensor([float(low) + (float(high) - float(low)) * next(draws)], dtype=torch.float64)

    def randint(low, high, size):
        return torch.tensor([low + int(next(place) * (high - low))])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        patch.setattr(torch, "randint", randint)
        image = Image.new("RGB", size[::-1])
        return list(map(int, transform.get_params(image, list(transform.scale), list(transform.ratio))))


def test_one_side_and_two_equal_ones_give_the_same_crops():
    image = torch.from_numpy(synthetic(1)[0]).permute(2, 0, 1)
    side, both = (MultiCrop(global_size=g, local_size=s, local_number=2) for g, s in ((32, 16), ((32, 32), (16, 16))))
    for ours, theirs in zip(side(image, sample=1, epoch=0)[:2], both(image, sample=1, epoch=0)[:2]):
        assert torch.equal(ours, theirs)
    assert side.pixels == both.pixels == 2 * 32 * 32 + 2 * 16 * 16
    assert MultiCrop(global_size=(24, 40), local_size=(8, 16), local_number=3).pixels == 2 * 24 * 40 + 3 * 8 * 16


def test_decoding_at_a_fraction_enlarges_no_side_of_a_crop():
    maker = MultiCrop(global_size=(24, 40), local_number=0)
    boxes = np.array([[0, 0, 200, 200], [0, 0, 100, 170]])  # 100 / 24 = 4.2, 170 / 40 = 4.25, 200 / 40 = 5
    assert maker.shrink_factor(boxes) == 4
    assert maker.shrink_factor(np.array([[0, 0, 200, 79], [0, 0, 200, 200]])) == 1  # 79 / 40 = 1.98
    assert maker.shrink_factor(np.array([[0, 0, 47, 200], [0, 0, 200, 200]])) == 1  # 47 / 24 = 1.96


def box_by_hand(u, height, width, scale, ratio):
    """Compute a box as RandomResizedCrop.get_params does, one try after another."""
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
    uniforms = crops.sample_uniforms(torch.arange(len(sizes)), 0)
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
    """Test against U(low, high) by Kolmogorov-Smirnov at p > .001 (asymptotic bound 1.949)."""
    x = (np.sort(np.asarray(values, dtype=float)) - low) / (high - low)
    steps = np.arange(len(x) + 1) / len(x)
    distance = max((steps[1:] - x).max(), (x - steps[:-1]).max())
    assert distance * math.sqrt(len(x)) < 1.949, distance


def assert_shares(counts, shares):
    """Test counts against shares by chi-square at p > .001 (Wilson-Hilferty)."""
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
    uniforms = crops.sample_uniforms(samples, 0)
    return crops, crops.boxes(uniforms, np.full((DRAWS, 2), 4000)), crops.colors(samples, 0)


@pytest.mark.parametrize("view, scale", [(2, (0.05, 0.25))])
def test_distribution_of_boxes(drawn, view, scale):
    (top, left, h, w), flips = drawn[1][0][:, view].T, drawn[1][1][:, view]
    assert_uniform(h * w / 4000**2, *scale)
    assert_uniform(np.log(w / h), math.log(3 / 4), math.log(4 / 3))
    rng = np.random.default_rng(0)  # positions are whole numbers: add noise for a continuous test
    assert_uniform((top + rng.random(DRAWS)) / (4000 - h + 1), 0, 1)
    assert_uniform((left + rng.random(DRAWS)) / (4000 - w + 1), 0, 1)
    assert_probability(flips, 0.5)


def test_distribution_of_global_area():
    crops = MultiCrop(local_number=0, global_scale=(0.25, 0.7))  # every box fits at the first try
    boxes, _ = crops.boxes(crops.sample_uniforms(torch.arange(DRAWS), 3), np.full((DRAWS, 2), 4000))
    for view in range(2):
        assert_uniform(boxes[:, view, 2] * boxes[:, view, 3] / 4000**2, 0.25, 0.7)


@pytest.mark.parametrize("view, blurred, solarized", [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_distribution_of_colors(drawn, view, blurred, solarized):
    colors = drawn[2][view * DRAWS : (view + 1) * DRAWS]
    for k, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert_uniform(colors.factors[:, k], low, high)
    assert_probability(colors.jitter.numpy(), 0.8)
    assert_probability(colors.gray.numpy(), 0.2)
    codes = (colors.order * torch.tensor([64, 16, 4, 1])).sum(1).numpy()
    _, counts = np.unique(codes, return_counts=True)
    assert_shares(counts, np.full(24, 1 / 24))
    assert (colors.order.sort(1).values == torch.arange(4)).all()
    on = colors.sigma > 0
    if blurred == 1:
        assert on.all()
    else:
        assert_probability(on.numpy(), blurred)
    assert_uniform(colors.sigma[on], 0.1, 2.0)
    if solarized:
        assert_probability(colors.solarize.numpy(), solarized)
    else:
        assert not colors.solarize.any()


def test_parameters_are_independent(drawn):
    c = drawn[2][DRAWS : 2 * DRAWS]
    other = drawn[2][:DRAWS]
    columns = [
        *c.factors.T,
        c.jitter,
        c.gray,
        c.sigma > 0,
        c.solarize,
        c.order[:, 0] == 0,
        other.factors[:, 0],
        other.jitter,
        torch.from_numpy(drawn[1][1][:, 1]),
        torch.from_numpy(drawn[1][0][:, 1, 0]),
    ]
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
    for other in (
        crops(image, sample=6, epoch=2),
        crops(image, sample=5, epoch=3),
        MultiCrop(global_size=48, local_size=24, local_number=4, seed=2)(image, sample=5, epoch=2),
    ):
        assert not torch.equal(first[0], other[0]) and not torch.equal(
            first[2].global_.factors, other[2].global_.factors
        )
    assert not torch.equal(first[0][0], first[0][1])


def test_batch_equals_single_samples_in_crop_major_order():
    images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in synthetic(3)]
    images[1] = images[1][:, :40, :60]
    crops = MultiCrop(global_size=32, local_size=16, local_number=3)
    global_crops, local_crops, params = crops.batch(iter(images), [9, 4, 7], epoch=1)
    for i, sample in enumerate((9, 4, 7)):
        one = crops(images[i], sample=sample, epoch=1)
        assert torch.equal(global_crops[i::3], one[0]) and torch.equal(local_crops[i::3], one[1])
        for whole, single in ((params.global_, one[2].global_), (params.local_, one[2].local_)):
            for name in ("jitter", "factors", "order", "gray", "sigma", "solarize"):
                assert torch.equal(getattr(whole, name)[i::3], getattr(single, name))


def test_no_local_crops():
    global_crops, local_crops, params = MultiCrop(global_size=8, local_size=4, local_number=0)(
        torch.zeros(3, 9, 9, dtype=torch.uint8), sample=0, epoch=0
    )
    assert tuple(local_crops.shape) == (0, 3, 4, 4) and len(params.local_) == 0 and len(params.global_) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        dict(global_size=0),
        dict(global_size=(32, 0)),
        dict(local_size=(32, 32, 32)),
        dict(local_size=()),
        dict(local_number=-1),
        dict(global_scale=(0.5, 1.2)),
        dict(local_scale=(0.5, 0.1)),
        dict(flip=1.5),
        dict(jitter=(0.4, 0.4, 0.2)),
        dict(jitter=(0.4, 0.4, 0.2, 0.7)),
        dict(blur_prob=(1.0, 0.5)),
        dict(ratio=(0, 1)),
        dict(blur_sigma=(0.0, 2.0)),
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(UserError) as caught:
        MultiCrop(**wrong)
    assert f"crops.{next(iter(wrong))}" in str(caught.value) and "\n" not in str(caught.value)

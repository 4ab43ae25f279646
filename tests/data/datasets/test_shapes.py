"""The embedded dataset: balanced, reproducible, and not solvable by second-order statistics."""

import numpy as np
import pytest
import torch

from maskwise.data.datasets.shapes import AREA, CLASSES, Shapes
from maskwise.errors import UserError

LIMIT = 0.65


@pytest.fixture(scope="module")
def drawn():
    """Return 160 gray images, float [n, 96, 96], their masks, and the dataset."""
    shapes = Shapes(160)
    images = torch.stack([shapes.image(i) for i in range(len(shapes))])
    masks = torch.stack([shapes.mask(i) for i in range(len(shapes))])
    return shapes, images, masks


def auc(score, positive):
    """Compute the probability that a positive scores above a negative."""
    order = score.argsort()
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[order] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    good, bad = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - good * (good + 1) / 2) / (good * bad))


def patch_statistics(images, masks, patch):
    """Compute mean, variance and gradient energy per patch [n, 3], and whether half of it is object."""
    gray = images.float().mean(1)
    across, down = gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2], gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]
    energy = torch.nn.functional.pad((across**2 + down**2) / 4, (1, 1, 1, 1))

    def patches(maps):
        return maps.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(0, 2)

    result = torch.stack([patches(gray).mean(-1), patches(gray).var(-1), patches(energy).mean(-1)], dim=1)
    return result.double(), patches(masks.float()).mean(-1) >= 0.5


def logistic(inputs, positive):
    """Fit a logistic regression to convergence and return its scores on the same patches."""
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    weight = torch.zeros(inputs.shape[1], dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weight, positive.double())
        loss.backward()
        return loss

    optimizer.step(closure)
    return (inputs @ weight).detach()


@pytest.mark.parametrize("patch", [8, 16])
def test_patch_statistics_do_not_reveal_objects(drawn, patch):
    statistics, on = patch_statistics(*drawn[1:], patch)
    scores = {name: statistics[:, i] for i, name in enumerate(("mean", "variance", "gradient"))}
    scores |= {f"{name}, distance from typical": (score - score.median()).abs() for name, score in scores.items()}
    scores |= {
        "logistic": logistic(statistics, on),
        "logistic, log energies": logistic(torch.cat([statistics[:, :1], statistics[:, 1:].log1p()], 1), on),
    }
    areas = {name: max(area := auc(score, on), 1 - area) for name, score in scores.items()}
    assert max(areas.values()) < LIMIT, areas


def test_object_and_background_share_mean_contrast_and_spectrum(drawn):
    _, images, masks = drawn
    gray = images.double().mean(1)
    on = torch.stack([image[mask].mean() for image, mask in zip(gray, masks)])
    off = torch.stack([image[~mask].mean() for image, mask in zip(gray, masks)])
    assert abs(float((on - off).mean())) < 1.5
    contrast = [
        torch.stack([image[part].std() for image, part in zip(gray, parts)]).mean() for parts in (masks, ~masks)
    ]
    assert abs(float(contrast[0] / contrast[1]) - 1) < 0.08
    spectra = []
    for parts in (masks, ~masks):
        windows = [
            image[y : y + 24, x : x + 24]
            for image, part in zip(gray, parts)
            for y in range(0, 73, 24)
            for x in range(0, 73, 24)
            if part[y : y + 24, x : x + 24].all()
        ]
        taper = torch.hann_window(24, periodic=False, dtype=torch.float64)
        power = (
            torch.fft.fft2(
                (torch.stack(windows) - torch.stack(windows).mean((1, 2), keepdim=True)) * taper * taper[:, None]
            )
            .abs()
            .square()
            .mean(0)
        )
        frequency = torch.fft.fftfreq(24).abs()
        radius = (torch.hypot(frequency[:, None], frequency) * 24).round().long()
        bands = torch.zeros(13, dtype=torch.float64).scatter_add_(0, radius.clamp(max=12).flatten(), power.flatten())
        spectra.append(bands / bands.sum())
    assert float((spectra[0] - spectra[1]).abs().sum()) / 2 < 0.15  # total variation distance of the spectra


def test_area_and_position(drawn):
    shapes, _, masks = drawn
    area = masks.double().mean((1, 2))
    assert area.min() >= 0.1 and area.max() <= 0.4
    assert area.min() < AREA[0] + 0.03 and area.max() > AREA[1] - 0.03
    boxes = torch.stack([shapes.box(i) for i in range(len(shapes))]).double()
    off = torch.hypot((boxes[:, 0] + boxes[:, 2] + 1) / 2 - 48, (boxes[:, 1] + boxes[:, 3] + 1) / 2 - 48)
    assert off.min() > 0.03 * 96 and off.mean() > 0.15 * 96
    centers = torch.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2])
    assert ((centers - 47.5).mean(1).abs() < 0.05 * 96).all()  # no preferred side


def test_box_is_tight(drawn):
    shapes, _, masks = drawn
    for i in range(0, 160, 7):
        x0, y0, x1, y1 = shapes.box(i).tolist()
        rows, columns = masks[i].any(1).numpy(), masks[i].any(0).numpy()
        assert [columns.argmax(), rows.argmax()] == [x0, y0]
        assert [95 - columns[::-1].argmax(), 95 - rows[::-1].argmax()] == [x1, y1]


def test_classes_are_balanced_under_any_stride():
    labels = Shapes(1024).labels
    assert labels.dtype == torch.int64 and len(CLASSES) == 8
    assert torch.bincount(labels, minlength=8).tolist() == [128] * 8
    for stride in (2, 4, 8, 16):
        counts = torch.bincount(labels[::stride], minlength=8) * stride / 128
        assert counts.min() > 0.3, (stride, counts)
    assert len(Shapes(13).labels) == 13


def test_image_depends_on_its_key_only():
    shapes = Shapes(24, size=48, seed=3)
    picture = shapes.image(11)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 48, 48)
    torch.rand(5), np.random.rand(5), shapes.image(2)
    assert torch.equal(picture, Shapes(24, size=48, seed=3).image(11))
    assert torch.equal(Shapes(4000, size=48, seed=3).image(11), picture)
    assert not torch.equal(Shapes(24, size=48, seed=4).image(11), picture)
    assert not torch.equal(Shapes(24, size=48, seed=3, split="test").image(11), picture)
    assert len({shapes.image(i).numpy().tobytes() for i in range(24)}) == 24


def test_fingerprint_differs_between_datasets():
    sets = [Shapes(8), Shapes(9), Shapes(8, size=64), Shapes(8, seed=1), Shapes(8, split="test")]
    assert len({one.fingerprint() for one in sets}) == 5
    assert sets[0].fingerprint() == Shapes(8).fingerprint()


def test_sizes_scale_the_same_image():
    small, large = (Shapes(6, size=size) for size in (48, 96))
    for i in range(6):
        shares = [one.mask(i).double().mean() for one in (small, large)]
        assert abs(shares[0] - shares[1]) < 0.02


def test_raw_pixels_hardly_predict_classes():
    """Check that raw-pixel nearest neighbors stay near chance (12.5 %): color, position and background vary."""
    train, test = Shapes(256, size=48), Shapes(96, size=48, split="test")
    banks = [torch.stack([one.image(i) for i in range(len(one))]).float().flatten(1) for one in (train, test)]
    banks = [torch.nn.functional.normalize(bank - bank.mean(1, keepdim=True)) for bank in banks]
    votes = train.labels[(banks[1] @ banks[0].T).topk(20).indices]
    right = (votes.mode(dim=1).values == test.labels).double().mean()
    assert right < 0.35


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 8}, {"split": "val"}])
def test_wrong_arguments_give_one_line(wrong):
    with pytest.raises(UserError) as caught:
        Shapes(**wrong)
    assert "\n" not in str(caught.value) and "shapes" in str(caught.value)

"""Few-shot k-NN against a loop over the published starts, and the images read for it."""

import math
import statistics

import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.few_shot import few_shot
from maskwise.evaluation.knn import FEW_SHOT, knn


class Points:
    """Images of one color, `per_class` of every class; sorted by class or in turn."""

    def __init__(self, per_class, classes=3, seed=0, in_turn=False, spread=60):
        labels = (
            torch.arange(classes).repeat(per_class) if in_turn else torch.arange(classes).repeat_interleave(per_class)
        )
        noise = torch.randint(0, spread, (len(labels), 3), generator=torch.Generator().manual_seed(seed))
        self.labels, self.read = labels, set()
        self.colors = (noise + 40 * torch.eye(3, dtype=torch.int64)[labels]).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        self.read.add(i)
        return self.colors[i].view(3, 1, 1).expand(3, 4, 4)

    def name(self, i):
        return f"{i}.png"

    def fingerprint(self):
        return str(self.colors.sum().item())


class Mean(torch.nn.Module):
    """An encoder whose feature is the mean color."""

    dim, mean, std, image_size = 3, (0.4, 0.4, 0.4), (1.0, 1.0, 1.0), (4, 4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def transform(self, image):
        return image.float() / 255 - 0.4

    def forward(self, images, attention=True, keys=False, layers=()):
        from maskwise.nn import Features

        return Features(images.mean(dim=(2, 3)) * self.weight, images.flatten(2).transpose(1, 2), None, (4, 4))


def by_loop(train, test, n):
    """Top-1 in per cent of each start, one query at a time, in Python floats."""
    k, starts = FEW_SHOT[n]
    vector = lambda data, i: (data.colors[i].double() / 255 - 0.4).tolist()  # noqa: E731
    unit = lambda v: [x / math.hypot(*v) for x in v]  # noqa: E731
    scores = {}
    for start in starts:
        bank = [i for c in range(3) for i in [j for j in range(len(train)) if train.labels[j] == c][start : start + n]]
        right = 0
        for q in range(len(test)):
            near = sorted(
                ((sum(a * b for a, b in zip(unit(vector(train, i)), unit(vector(test, q)))), -i) for i in bank),
                reverse=True,
            )[:k]
            votes = [0.0] * 3
            for similarity, i in near:
                votes[int(train.labels[-i])] += math.exp(similarity / 0.07)
            right += votes.index(max(votes)) == int(test.labels[q])
        scores[start] = 100 * right / len(test)
    return scores


@pytest.mark.parametrize("in_turn", [False, True])
def test_accuracy_is_the_mean_over_the_published_starts(in_turn):
    train, test = Points(100, in_turn=in_turn), Points(7, seed=1)
    report = few_shot(Mean(), {"train": train, "test": test})
    for n in (1, 5, 10, 20):
        expected = by_loop(train, test, n)
        assert report.protocol["runs"][n] == pytest.approx(expected)
        assert len(expected) == 5
        assert report.numbers[f"top1_{n}"] == pytest.approx(statistics.fmean(expected.values()))
        assert report.numbers[f"std_{n}"] == pytest.approx(statistics.stdev(expected.values()))
    assert 20 < report.numbers["top1_1"] < 100 and report.protocol["differences"] == []
    assert report.protocol["k"] == {1: 1, 5: 20, 10: 20, 20: 20}


def test_starts():
    assert {n: (k, list(starts)) for n, (k, starts) in FEW_SHOT.items()} == {
        1: (1, [0, 5, 10, 15, 20]),
        5: (20, [0, 5, 10, 15, 20]),
        10: (20, [0, 10, 20, 30, 40]),
        20: (20, [0, 20, 40, 60, 80]),
    }


def test_equals_the_few_shot_option_of_knn():
    data = {"train": Points(30), "test": Points(7, seed=1)}
    numbers = few_shot(Mean(), data, per_class=(1, 5)).numbers
    other = knn(Mean(), data, k=5, feature="pooled", few_shot=(1, 5)).numbers
    assert (numbers["top1_1"], numbers["top1_5"]) == (other["pooled_few_shot_1"], other["pooled_few_shot_5"])


def test_only_images_of_some_run_are_read():
    train = Points(200, in_turn=True)
    few_shot(Mean(), {"train": train, "test": Points(2, seed=1)}, per_class=1)
    assert train.read == {3 * start + c for start in (0, 5, 10, 15, 20) for c in range(3)}


def test_starts_that_a_class_cannot_fill_are_left_out_and_listed():
    report = few_shot(Mean(), {"train": Points(30), "test": Points(4, seed=1)}, per_class=[10, 20])
    assert list(report.protocol["runs"][10]) == [0, 10, 20] and list(report.protocol["runs"][20]) == [0]
    assert report.protocol["differences"] == [
        "10 per class: starts [30, 40] left out, the smallest class is too small",
        "20 per class: starts [20, 40, 60, 80] left out, the smallest class is too small",
    ]
    assert report.numbers["std_20"] == 0.0


def test_unreadable_image_is_left_out_and_listed():
    from maskwise.data.decoding.image import CorruptImage

    class Torn(Points):
        def image(self, i):
            if i == 5:
                raise CorruptImage(self.name(i), "torn")
            return super().image(i)

    report = few_shot(Mean(), {"train": Torn(30), "test": Points(4, seed=1)}, per_class=5)
    assert report.corrupt == {"5.png": "torn"} and len(report.protocol["runs"][5]) == 5


@pytest.mark.parametrize(
    "options, per_class, line",
    [
        ({"per_class": 3}, 30, "few-shot k-NN is defined for 1, 5, 10, 20 images per class, not 3"),
        (
            {"per_class": 20},
            19,
            "few-shot k-NN with 20 images per class: the smallest class has 19; choose fewer, or give more images",
        ),
        ({"per_class": ()}, 30, "few-shot k-NN has no number of images per class; give per_class=[1, 5, 10, 20]"),
        ({"temperature": 0}, 30, "few-shot k-NN: temperature is 0; it must be above 0"),
    ],
)
def test_mistakes_are_refused(options, per_class, line):
    with pytest.raises(UserError) as caught:
        few_shot(Mean(), {"train": Points(per_class), "test": Points(2)}, **options)
    assert str(caught.value) == line


def test_labels_are_required():
    bare = Points(5)
    bare.labels = None
    with pytest.raises(UserError, match="the training images have no labels"):
        few_shot(Mean(), {"train": bare, "test": Points(5)})


def test_few_shot_is_in_evaluations():
    assert EVALUATIONS["few_shot"].run is few_shot

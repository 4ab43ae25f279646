"""Labeled sets meet by class name in every evaluation, and sets that cannot be scored end in one line."""

import numpy as np
import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.linear import linear
from maskwise.evaluation.probes import batches
from maskwise.evaluation.protocol import labeled_sets
from support.tiny_sets import Colors, Part, Renamed, tiny_encoder

NAMES = ("über", "1", "10", "2")
OPTIONS = {
    "knn": {"k": (1, 5), "few_shot": 5, "pixels": 4},
    "few_shot": {"per_class": (1, 5)},
    "linear": {"augment": False, "epochs": 4, "batch_size": 8, "lr": (1.0, 5.0), "feature": "pooled"},
    "logistic": {},
    "attentive": {"epochs": 2, "warmup_epochs": 0, "batch_size": 16, "lr": 0.02, "augment": False},
    "finetune": {"epochs": 3, "warmup_epochs": 0, "batch_size": 16, "lr": 0.05, "repeats": 1},
    "masked": {"ratios": (0.5,), "k": 3},
    "robustness": {"k": 3},
    "analysis": {"parts": ("tokens",), "k": 3},
    "recall": {"ks": (1, 2)},
    "copy_detection": {},
    "top1": {},
}


def colors(count, seed=0, classes=4):
    images = Colors(count, classes=classes, seed=seed)
    images.classes = list(NAMES[:classes])
    return images


def roles(name, test, train):
    """The data of an evaluation with these sets."""
    if name == "recall":
        return {"test": test, "gallery": train}
    if name == "copy_detection":
        return {"database": train, "copies": {"strong": test}}
    if name == "robustness":
        return {"train": train, "test": colors(16, seed=3), "shifted": test}
    return {"train": train, "test": test}


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder("map", depth=1, class_token=True)


@pytest.fixture(scope="module")
def probe(encoder, tmp_path_factory):
    file = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    linear(encoder, {"train": colors(24), "test": colors(8, seed=1)}, save=file, **OPTIONS["linear"])
    return file


def evaluate(name, encoder, test, train, probe):
    options = {**OPTIONS[name], **({"probe": probe} if name == "top1" else {})}
    data = roles(name, test, train)
    if name == "top1":
        del data["train"]
    return EVALUATIONS[name](encoder, data, **options).numbers


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_do_not_depend_on_how_classes_are_numbered(encoder, probe, name):
    train, test = colors(24), colors(12, seed=1)
    expected = evaluate(name, encoder, test, train, probe)
    assert evaluate(name, encoder, Renamed(test, [2, 0, 3, 1]), train, probe) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"robustness", "top1"}))  # these restrict scores by the names
def test_a_class_without_test_images_changes_no_other(encoder, probe, name):
    """As if the test set had a folder of that class, without images."""
    train, part = colors(24), Part(colors(12, seed=1))
    whole = Part(colors(12, seed=1))
    whole.classes, whole.labels = list(NAMES), whole.labels + 1
    assert evaluate(name, encoder, part, train, probe) == pytest.approx(
        evaluate(name, encoder, whole, train, probe), nan_ok=True
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_unknown_classes_end_in_one_line_that_names_them(encoder, probe, name):
    test = colors(12, seed=1)
    test.classes = [*NAMES[:3], "Unbekannt"]
    with pytest.raises(UserError, match="Unbekannt") as caught:
        evaluate(name, encoder, test, colors(24), probe)
    assert "\n" not in str(caught.value) and "unknown to" in str(caught.value)


def test_sets_that_cannot_be_scored():
    train, test = colors(8), colors(4, seed=1)
    unlabeled, empty, partly = colors(4), colors(4), colors(4)
    unlabeled.labels = None
    empty.n, empty.labels = 0, torch.zeros(0, dtype=torch.int64)
    partly.labels = torch.tensor([0, -1, 1, -1])
    for images, line in (
        (unlabeled, "x needs labels: the test images have no labels; give one subfolder per class"),
        (None, "x needs labels, and the test images have none; give test=FOLDER with one subfolder per class"),
        (empty, "x: the test images are an empty set; give test=FOLDER that holds images"),
        (partly, "x: 2 of the test images have no label, only a number below 0; leave them out"),
    ):
        with pytest.raises(UserError) as caught:
            labeled_sets("x", {"train": train, "test": images}, "train", "test")
        assert str(caught.value) == line
    data = labeled_sets("x", {"train": train, "test": test, "other": 3}, "train", "test")
    assert data == {"train": train, "test": test, "other": 3}


BROKEN = {"broken": range(9)}
TESTED = sorted(OPTIONS)
LEARNED = sorted(OPTIONS.keys() - {"top1", "copy_detection", "recall"})


@pytest.mark.parametrize("name", TESTED)
def test_test_images_of_which_none_can_be_read(encoder, probe, name):
    test = Colors(9, classes=4, seed=1, **BROKEN)
    test.classes = list(NAMES)
    with pytest.raises(UserError, match=r"none of the 9 images can be read \(\d.png: cut short\); give images"):
        evaluate(name, encoder, test, colors(24), probe)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("name", LEARNED)
def test_training_images_of_which_none_can_be_read(encoder, probe, monkeypatch, name, augment):
    if augment and "augment" not in OPTIONS[name]:
        pytest.skip("no crops")
    monkeypatch.setitem(OPTIONS[name], "augment", augment) if "augment" in OPTIONS[name] else None
    train = Colors(9, classes=4, **BROKEN)
    train.classes = list(NAMES)
    options = {"finetune": {"batch_size": 4}, "few_shot": {"per_class": 1}, "knn": {"few_shot": ()}}.get(name, {})
    for key, value in options.items():
        monkeypatch.setitem(OPTIONS[name], key, value)
    with pytest.raises(UserError, match="none of the 9 images can be read"):
        evaluate(name, encoder, colors(8, seed=1), train, probe)


@pytest.mark.parametrize("name", ["linear", "attentive"])
def test_a_window_or_step_without_a_readable_image_trains_nothing(encoder, monkeypatch, name):
    """The numbers are those of the readable images."""
    monkeypatch.setattr(batches, "WINDOW", 4)
    train, test = colors(12), colors(8, seed=1)
    train.broken = range(2, 12)
    options = {**OPTIONS[name], "augment": True, "batch_size": 4}
    report = EVALUATIONS[name](encoder, {"train": train, "test": test}, **options)
    assert 0 <= report.numbers["top1_last"] <= 100 and set(report.corrupt) == {f"{i}.png" for i in range(2, 12)}


def test_one_class_one_image_and_more_neighbors_than_images(encoder):
    one = {"train": colors(5, classes=1), "test": colors(3, seed=1, classes=1)}
    for name in ("knn", "few_shot", "linear", "logistic", "attentive", "finetune", "masked"):
        options = {**OPTIONS[name], **({"batch_size": 4} if name == "finetune" else {})}
        options |= {"per_class": 1} if name == "few_shot" else {}
        numbers = EVALUATIONS[name](encoder, one, **options).numbers
        assert numbers.get("top1", numbers.get("top1_1")) == 100.0, name
    single = {"train": colors(1, classes=1), "test": colors(1, seed=1, classes=1)}
    assert EVALUATIONS["knn"](encoder, single, k=200).numbers["top1"] == 100.0
    with pytest.raises(UserError, match="larger than an epoch of 1 images; give at least 2 images"):
        EVALUATIONS["finetune"](encoder, single, epochs=1, warmup_epochs=0, batch_size=2)


def test_recall_of_more_neighbors_than_images(encoder):
    """A query without another image of its class is a miss for every k."""
    data = {"test": colors(5)}  # classes 0 1 2 3 0
    assert EVALUATIONS["recall"](encoder, data, ks=(4, 5, 100)).numbers == {
        "recall_4": 40,
        "recall_5": 40,
        "recall_100": 40,
    }
    assert EVALUATIONS["recall"](encoder, {"test": colors(1)}, ks=2).numbers == {"recall_2": 0.0}


@pytest.mark.parametrize(
    "name, options, line",
    [
        ("knn", {"k": [1, "x"]}, "k-NN: k is x; it must be a whole number"),
        ("knn", {"k": None}, "k-NN: k is None; it must be a whole number"),
        ("knn", {"batch_size": 0}, "k-NN: batch_size is 0; it must be a whole number, at least 1"),
        ("knn", {"pixels": -1}, "k-NN: pixels is -1; it must be true or false or a whole number, at least 0"),
        ("linear", {"lr": []}, "linear: lr, weight_decay or optimizer is an empty list; give at least one of each"),
        ("linear", {"lr": float("nan")}, "linear: lr is nan; it must be above 0"),
        ("finetune", {"batch_size": [4]}, "finetune: batch_size is [4]; it must be a whole number, at least 1"),
        ("finetune", {"warmup_epochs": -1}, "finetune: warmup_epochs is -1; it must be a whole number, at least 0"),
        ("recall", {"ks": [1, 0]}, "recall: ks is 0; it must be a whole number, at least 1"),
        ("attentive", {"augment": 3}, "attentive: augment is 3; it must be true or false"),
        ("retrieval", {"long_side": "x"}, "retrieval: long_side is x; it must be a whole number, at least 1"),
        ("copy_detection", {"size": True}, "copy detection: size is True; it must be a whole number, at least 1"),
        ("analysis", {"beside": 3}, "analysis: beside is 3; it must be a text or a path"),
    ],
)
def test_options_of_another_type_or_out_of_range(encoder, name, options, line):
    with pytest.raises(UserError) as caught:
        EVALUATIONS[name](encoder, {"train": colors(4), "test": colors(4)}, **options)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "name, options, warmup",
    [
        ("attentive", {"epochs": 9}, 1),
        ("attentive", {"epochs": 11}, 10),
        ("finetune", {"epochs": 2}, 0),
        ("finetune", {"epochs": 6}, 5),
        ("finetune", {"epochs": 10, "preset": "ibot-imagenet"}, 1),
    ],
)
def test_warm_ups_are_shortened_with_the_run(encoder, name, options, warmup):
    data = {"train": colors(4), "test": colors(4)}
    protocol = EVALUATIONS[name](encoder, data, batch_size=4, evaluate_every=99, **options).protocol
    assert protocol["warmup_epochs"] == warmup
    published = {"attentive": 10, "deit": 5, "ibot-imagenet": 20}[protocol["preset"] if name == "finetune" else name]
    assert (f"warmup_epochs {warmup} instead of {published}" in protocol["differences"]) == (warmup != published)


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "x", (), [-1], [1, "x"], float("nan"), {"a": 1}], ids=str)
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(name, value):
    row = EVALUATIONS[name]
    for key in row.option_names:
        try:
            row.options(**{key: value})
        except UserError as error:
            assert "\n" not in str(error) and f"{key} is " in str(error)


def test_numbers_of_numpy_are_numbers():
    options = EVALUATIONS["knn"].options(k=[np.int64(3)], temperature=np.float32(0.5))
    assert options.ks == (3,) and EVALUATIONS["recall"].options(ks=range(1, 3)).ks == range(1, 3)

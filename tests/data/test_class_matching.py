"""Classes of two labeled sets are matched by name."""

import copy
import pickle
import unicodedata

import pytest
import torch

from maskwise.data.benchmark_sets import imagenet
from maskwise.data.class_matching import class_names, match_classes, numbered_like, present_classes
from maskwise.data.datasets import Folder, ImageList, Shapes
from maskwise.errors import UserError
from support.benchmark_folders import photograph

WNIDS = imagenet.synsets()
NFC, NFD = (unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD"))


class Labels:
    """A set of labels and class names."""

    def __init__(self, labels, classes=None):
        self.labels, self.classes = torch.as_tensor(labels, dtype=torch.int64), classes

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"{index}.png"


@pytest.mark.parametrize(
    "names, known, places",
    [
        (["b", "a"], ["a", "b", "c"], [1, 0]),
        (["d", "a"], ["a", "b"], [-1, 0]),
        ([NFD, "b"], ["a", "b", NFC], [2, 1]),
        ([NFC], ["a", NFD], [1]),
        ([NFC, NFD], [NFD, NFC], [1, 0]),  # both forms in one set: equal names first
        (["0", "1", "10", "11", "2"], [str(k) for k in range(12)], [0, 1, 10, 11, 2]),
        (["00", "01", "10"], ["0", "1", "2", "10"], [0, 1, 3]),
        (["7", "x"], ["07", "x"], [-1, 1]),
        (["2", "0"], [WNIDS[0], WNIDS[2]], [1, 0]),
        ([WNIDS[2], WNIDS[5]], ["0", "2"], [1, -1]),
        ([], ["a"], []),
    ],
)
def test_places_of_names(names, known, places):
    matched = match_classes(names, known)
    assert matched.dtype == torch.int64 and matched.tolist() == places


def test_numbered_like_another_set():
    bank = Labels([0, 1, 2], ["a", "b", "c"])
    test = numbered_like(Labels([0, 1, 1], ["b", "c"]), bank, "k-NN")
    assert test.labels.tolist() == [1, 2, 2] and test.classes == ["a", "b", "c"]
    assert len(test) == 3 and test.name(2) == "2.png"
    assert present_classes(test)[1] == ["b", "c"]
    same = Labels([0, 1], ["a", "b"])
    assert numbered_like(same, bank, "k-NN") is same
    empty = Labels([1], ["d", "b"])  # nothing is labeled d
    assert numbered_like(empty, bank, "k-NN").labels.tolist() == [1]
    for unnamed in (Labels([7, 2]), Labels([7, 2], [])):
        assert numbered_like(unnamed, bank, "k-NN") is unnamed and class_names(unnamed) is None
    named = Labels([1, 0], ["a", "b"])
    assert numbered_like(named, Labels([5, 6]), "k-NN") is named


def test_unknown_classes_are_named_in_one_line():
    bank, test = Labels([0, 1], ["a", "b"]), Labels([0, 1, 2, 0], ["b", "e", "d"])
    with pytest.raises(UserError) as caught:
        numbered_like(test, bank, "k-NN")
    assert str(caught.value) == (
        "k-NN: the test images have 2 classes unknown to the training images: e, d; "
        "give both the same class names, or leave these classes out"
    )


def test_folders_and_lists(tmp_path):
    """Folders sort 0, 1, 10, 11, 2 as text, lists as numbers."""
    for k in range(12):
        photograph(tmp_path / str(k) / "x.png", k, (4, 4))
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{k}/x.png,{k}\n" for k in range(12)))
    folder, listed = Folder(tmp_path), ImageList(tmp_path / "list.csv")
    matched = numbered_like(listed, folder, "k-NN")
    assert [folder.classes[label] for label in matched.labels] == [str(k) for k in range(12)]
    assert matched.fingerprint() == listed.fingerprint() and torch.equal(matched.image(3), listed.image(3))


def test_images_are_those_of_the_set_and_copies_can_be_sent_to_workers():
    shapes = Shapes(16, 32)  # draws an image from its label
    shuffled = Labels(shapes.labels, list(reversed(shapes.classes)))
    other = numbered_like(shapes, shuffled, "k-NN")
    assert other.labels.tolist() == (7 - shapes.labels).tolist() and torch.equal(other.image(3), shapes.image(3))
    assert torch.equal(other.mask(3), shapes.mask(3)) and not hasattr(other, "boxes")
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(again.labels, other.labels) and torch.equal(again.image(1), shapes.image(1))

"""Held-out images: a part of each class, chosen by the names of the images alone."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from maskwise.data.datasets import Folder, ImageList, holdout
from maskwise.data.datasets.contents import contents
from maskwise.data.reader import DecodedDataset
from maskwise.errors import UserError


def photos(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name / f"{number:02d}.png")
    return root


def names(dataset):
    return [dataset.name(index) for index in range(len(dataset))]


def by_hand(keys, count):
    """The `count` keys of one class with the smallest hashes."""
    numbers = {
        key: int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=b"maskwise holdout").digest(), "little")
        for key in keys
    }
    return sorted(sorted(keys, key=numbers.get)[:count])


def test_smallest_hashes_of_each_class(tmp_path):
    data = Folder(photos(tmp_path / "a", cat=30, dog=19, owl=9))
    train, test = holdout.split(data, 0.1)
    of = {name: [key for key in names(data) if key.startswith(name)] for name in data.classes}
    assert names(test) == by_hand(of["cat"], 3) + by_hand(of["dog"], 1)  # floor(.1 n); none of nine
    assert sorted(names(train) + names(test)) == names(data) and test.classes == data.classes
    assert test.labels.tolist() == [0, 0, 0, 1] and train.notes[-1].startswith("4 of 58 images are held out")
    assert test.image(1)[0, 0, 0] == int(names(test)[1][-6:-4])  # the red of the image of that name


def test_the_place_does_not_matter_and_an_added_image_changes_one(tmp_path):
    photos(tmp_path / "a", cat=29, dog=20)
    first = names(holdout.split(Folder(tmp_path / "a"), 0.1)[1])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "cat" / "new.png")
    moved = names(holdout.split(Folder(tmp_path / "b"), 0.1)[1])
    assert len(first) == 4 and len(moved) == 5 and len(set(first) - set(moved)) <= 1
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"a/{n},{n[:3]}\n" for n in names(Folder(tmp_path / "a")))
    )
    assert len(holdout.split(ImageList(tmp_path / "list.csv"), 0.1)[1]) == 4


def test_at_most_five_thousand():
    labels = np.repeat(np.arange(4), 50_000)
    rows = holdout.held_out_rows([str(k) for k in range(200_000)], labels, 0.1)
    assert np.bincount(labels[rows]).tolist() == [1250] * 4
    assert len(holdout.held_out_rows([str(k) for k in range(100)], np.zeros(100), 0.29)) == 29


def test_parts_are_read_pickled_and_described_as_the_whole(tmp_path):
    data = Folder(photos(tmp_path / "a", cat=30))
    train, test = holdout.split(data, 0.1)
    again = pickle.loads(pickle.dumps(test))
    assert again.source(0) == tmp_path / "a" / names(test)[0] and again.max_pixels == data.max_pixels
    assert DecodedDataset(again).encoded and not hasattr(again, "mask")
    described = contents(train)
    assert described["count"] == 27 and described["names"] == contents(data)["names"]
    assert described["rows"] != contents(test)["rows"]


def test_refusals(tmp_path):
    photos(tmp_path / "few", cat=9, dog=3)
    with pytest.raises(UserError, match="holds out no image: the largest class has 9"):
        holdout.split(Folder(tmp_path / "few"), 0.1)
    with pytest.raises(UserError, match="data.holdout: .* no subfolders of them; .*, or data.holdout=null"):
        holdout.split(Folder(tmp_path / "few" / "cat"), 0.1)

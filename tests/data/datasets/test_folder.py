"""Folders with and without classes, and the messages for folders without images."""

import pytest
import torch
from PIL import Image

from maskwise.data.datasets import DATASETS, Folder
from maskwise.data.datasets.subset import Subset
from maskwise.errors import UserError


def put(path, level=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog", "eel")):
            for k in (2, 0, 1, 10):
                put(tmp_path / split / name / f"{k:03d}.png", level=10 * label + k)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "train" / "empty").mkdir()
    put(tmp_path / "train" / "dog" / ".hidden.png")
    return tmp_path


def test_classes(tree):
    data = Folder(tree, split="train")
    assert len(data) == 12 and data.classes == ["cat", "dog", "eel"]
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [data.name(i) for i in range(4)] == ["cat/000.png", "cat/001.png", "cat/002.png", "cat/010.png"]
    assert tuple(data.image(5).shape) == (3, 4, 6) and int(data.image(5)[0, 0, 0]) == 11


def test_first_of_each_class(tree):
    data = Folder(tree, split="train", per_class=2)
    assert [data.name(i) for i in range(len(data))] == [f"{c}/00{k}.png" for c in ("cat", "dog", "eel") for k in (0, 1)]
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(Folder(tree, split="train", per_class=99)) == 12


def test_deep_files_belong_to_their_class(tmp_path):
    put(tmp_path / "a" / "x.png")
    put(tmp_path / "a" / "deep" / "y.png")
    put(tmp_path / "b" / "z.png")
    data = Folder(tmp_path)
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("names", [["one.png"], ["one.png", "sub/two.png"], ["s/t/u/one.png", "s/t/two.png"]])
def test_without_classes(tmp_path, names):
    for name in names:
        put(tmp_path / name)
    data = Folder(tmp_path)
    assert data.labels is None and data.classes is None and len(data) == len(names)
    with pytest.raises(UserError, match="per_class"):
        Folder(tmp_path, per_class=1)


def test_extensions_in_any_case(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.PNG", "d.bmp", "e.WebP", "f.tif", "g.TIFF", "h.ppm", "i.gif"):
        put(tmp_path / name)
    data = Folder(tmp_path)
    assert len(data) == 9 and all(data.image(i).shape[0] == 3 for i in range(9))


def test_fingerprint_follows_the_files(tree):
    first = Folder(tree, split="train").fingerprint()
    assert first == Folder(str(tree), split="train").fingerprint() and int(first, 16)
    assert first != Folder(tree, split="val", per_class=1).fingerprint()
    put(tree / "train" / "cat" / "000.png", size=(60, 40))
    assert first != Folder(tree, split="train").fingerprint()


def test_messages_for_missing_folders(tmp_path):
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    (empty / "train" / "cat").mkdir(parents=True)
    texts.mkdir()
    for name in ("a.txt", "b.txt", "c.csv", "README"):
        (texts / name).write_text("x")
    cases = [
        (dict(path=tmp_path / "gone"), ["does not exist", "gone"]),
        (dict(path=texts / "a.txt"), ["is a file"]),
        (dict(path=empty), ["is empty", "jpg"]),
        (dict(path=texts), ["no images", "2 .txt", "1 .csv", "1 readme"]),
        (dict(path=empty, split="val"), ["has no subfolder val/; it has train:", "set data.split=null"]),
        (dict(path=empty, per_class=0), ["per_class"]),
    ]
    for arguments, expected in cases:
        with pytest.raises(UserError) as caught:
            Folder(**arguments)
        line = str(caught.value)
        assert "\n" not in line and all(part in line for part in expected), line


@pytest.mark.parametrize(
    "names, reason",
    [
        (["1.png", "2.png"], "{} has images but no subfolders of them; give one subfolder per class"),
        (
            ["a/1.png", "a/2.png", "b/1.png", "z.png"],
            "{}/z.png lies beside the class folders, so they are not read as classes; move it",
        ),
        (
            ["a/1.png", "x.png", "y.png", "z.png"],
            "{}/x.png and 2 more lie beside the class folders, so they are not read as classes; move them",
        ),
        (
            ["a/1.png", "b/c/1.png", "b/d/1.png"],
            "{}/b holds images in subfolders only (b/c/1.png), so the folders of {} are not read as classes; move its "
            "images up",
        ),
        (["a/1.png", "b/c/1.png", "b/1.png"], None),
    ],
)
def test_the_reason_for_missing_labels(tmp_path, names, reason):
    for name in names:
        put(tmp_path / name)
    data = Folder(tmp_path)
    assert (data.labels is None) == (reason is not None)
    assert data.no_labels == (reason and reason.replace("{}", str(tmp_path)))
    assert Subset(data, [0]).no_labels == data.no_labels
    assert data.notes == ([data.no_labels] if reason and "beside" in reason and len(names) > 3 else [])


def test_table():
    assert {"folder", "list", "torchvision", "huggingface", "shapes"} <= set(DATASETS)


def test_cifar_pack():
    packs = pytest.importorskip("packs")
    root = packs.unpack("cifar10-jpeg-small")
    root = root if (root / "train").is_dir() else root / "cifar10-jpeg-small"
    data = Folder(root, split="val")
    assert len(data) == 2000 and len(data.classes) == 10 and tuple(data.image(1999).shape) == (3, 32, 32)

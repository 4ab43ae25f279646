"""Contents of datasets: the same in another place, others after any change, and cheap."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskwise.data.datasets import DATASETS, contents
from maskwise.data.datasets.huggingface import HuggingFace
from maskwise.data.datasets.torchvision_sets import TorchvisionSet


def png(k, size=9):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (size, 7, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def photos(root, numbers=range(4), size=9):
    root.mkdir(parents=True, exist_ok=True)
    for k in numbers:
        (root / f"{k}.png").write_bytes(png(k, size))
    return root


def folder(root):
    return DATASETS["folder"](path=root / "photos")


def listed(root):
    (root / "list.txt").write_text("".join(f"photos/{path.name}\n" for path in sorted((root / "photos").iterdir())))
    return DATASETS["list"](path=root / "list.txt")


def packed(root):
    with tarfile.open(root / "photos.tar", "w") as tar:
        for path in sorted((root / "photos").iterdir()):
            tar.add(path, path.name)
    return DATASETS["tar"](path=root / "photos.tar")


def of_torchvision(root):
    """A set whose images are files, as torchvision's own hold them."""
    made = TorchvisionSet.__new__(TorchvisionSet)
    files = sorted((root / "photos").iterdir())

    class Files(list):
        _samples = [(str(path), 0) for path in files]

    made.dataset, made.root, made.rows, made.set, made.split = Files(files), root, None, "Food101", "train"
    return made


def of_huggingface(root):
    """A split whose images are encoded bytes, as the `datasets` library gives them."""
    made = HuggingFace.__new__(HuggingFace)
    made.path, made.split, made.rows, made.image_column = str(root), "train", None, "image"
    files = sorted((root / "photos").iterdir())
    made.table = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in files]
    return made


CHANGES = {
    "count": lambda root: photos(root, [9]),
    "names": lambda root: (root / "0.png").rename(root / "00.png"),
    "sizes": lambda root: photos(root, [0], size=20),
    "bytes": lambda root: (root / "0.png").write_bytes(png(0)[:-1] + b"x"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("open_set", [folder, listed, packed, of_torchvision, of_huggingface])
def test_each_change_is_seen_and_a_move_is_not(open_set, change, tmp_path):
    photos(tmp_path / "a" / "photos")
    first = contents.contents(open_set(tmp_path / "a"))
    assert first.keys() == {"count", "names", "sizes", "bytes"} and first["count"] == 4
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert contents.contents(open_set(tmp_path / "b")) == first
    CHANGES[change](tmp_path / "b" / "photos")
    second = contents.contents(open_set(tmp_path / "b"))
    assert second[change] != first[change]
    assert change == "count" or second["count"] == 4


def test_pixels_in_memory():
    def pixels(data):
        made = TorchvisionSet.__new__(TorchvisionSet)

        class Arrays(list):
            pass

        made.dataset = Arrays(data)
        made.dataset.data, made.root, made.rows, made.set, made.split = data, Path(), None, "CIFAR10", "train"
        return contents.contents(made)

    data = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    changed = data.copy()
    changed[5, 0, 0, 0] ^= 1
    assert pixels(data) == pixels(data.copy()) and pixels(data)["pixels"] != pixels(changed)["pixels"]


def test_shapes_and_own_classes():
    first, second = (contents.contents(DATASETS["shapes"](count=16, size=size)) for size in (40, 48))
    assert first["count"] == second["count"] == 16 and first["settings"] != second["settings"]
    assert contents.contents([1, 2, 3]) == {"count": 3}  # a class of one's own need not describe itself


def test_a_million_files_are_not_all_read(tmp_path, monkeypatch):
    photos(tmp_path / "photos", range(100))
    data = folder(tmp_path)
    stats, opened = [], []
    monkeypatch.setattr(contents, "SAMPLED", 10)
    monkeypatch.setattr(contents.sampled, "__defaults__", (10,))
    monkeypatch.setattr(contents, "size", lambda path: stats.append(path) or os.stat(path).st_size)
    monkeypatch.setattr(contents, "beginning", lambda path: opened.append(path) or b"")
    found = contents.contents(data)
    assert len(stats) == 10 and len(opened) == contents.OPENED and found["count"] == 100
    assert [path.name for path in stats[:3]] == [Path(data.files[row]).name for row in (0, 10, 20)]


def test_files_that_are_gone_or_are_no_files(tmp_path):
    root = photos(tmp_path / "photos")
    data = folder(tmp_path)
    first = contents.contents(data)
    (root / "0.png").unlink()
    os.mkfifo(root / "0.png")
    assert contents.size(root / "9.png") == -1 and contents.beginning(root / "9.png") == b""
    assert contents.contents(data)["sizes"] != first["sizes"]

"""Tar files read in place: images and labels equal the packed files, from any process."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.datasets.tar import Tar
from maskwise.data.decoding.image import CorruptImage, decode
from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.errors import UserError

CROPS = MultiCrop(global_size=8, local_size=4, local_number=1)


def png(k, size=(9, 7)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, files, kind=tarfile.PAX_FORMAT, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_equal_the_packed_files(tmp_path, kind):
    long = "class_b/" + ("x" * 60 + "/") * 2 + "4.png"  # longer than the name field of a header
    files = {
        "class_b/1.png": png(1),
        "class_a/2.png": png(2, (30, 40)),
        "readme.txt": b"hello",
        "class_b/.3.png": png(3),
        long: png(4),
    }
    data = Tar(pack(tmp_path / "a.tar", files, kind))
    assert len(data) == 3 and data.classes == ["class_a", "class_b"] and data.labels.tolist() == [1, 0, 1]
    for k, name in enumerate(["class_b/1.png", "class_a/2.png", long]):
        assert (
            data.name(k) == f"a.tar/{name}"
            and data.source(k) == files[name]
            and torch.equal(data.image(k), decode(files[name]))
        )


def test_several_files_patterns_and_splits(tmp_path):
    for split, first in (("train", 0), ("val", 10)):
        for k in range(3):
            pack(tmp_path / split / f"part-{k:02d}.tar", {f"{split}/{c}/{first + k}.png": png(first + k) for c in "uv"})
    whole = Tar(tmp_path, split="train")
    assert len(whole) == 6 and whole.classes == ["u", "v"] and whole.labels.tolist() == [0, 1] * 3
    assert [whole.name(k) for k in (0, 5)] == ["part-00.tar/train/u/0.png", "part-02.tar/train/v/2.png"]
    some = Tar(str(tmp_path / "val" / "part-{00..01}.tar"))
    assert [some.source(k) for k in range(4)] == [png(10), png(10), png(11), png(11)]
    assert len(Tar(tmp_path / "val" / "*-02.tar")) == 2
    few = Tar(tmp_path, split="train", per_class=1)
    assert [few.name(k) for k in range(2)] == [whole.name(0), whole.name(1)] and few.labels.tolist() == [0, 1]
    assert whole.fingerprint() == Tar(tmp_path / "train").fingerprint() != some.fingerprint()


def test_labels_from_cls_members(tmp_path):
    files = {}
    for k, label in enumerate((2, 0, 2, 1)):
        files |= {f"{k:04d}.png": png(k), f"{k:04d}.cls": str(label).encode() + b"\n", f"{k:04d}.json": b"{}"}
    data = Tar(pack(tmp_path / "a.tar", files))
    assert data.labels.tolist() == [2, 0, 2, 1] and data.classes == ["0", "1", "2"]
    for change, words in (({"0001.cls": None}, "0001.png without 0001.cls"), ({"0002.cls": b"cat"}, "'cat'")):
        changed = {name: data for name, data in {**files, **change}.items() if data is not None}
        with pytest.raises(UserError, match=words):
            Tar(pack(tmp_path / "b.tar", changed))


def test_images_without_folders_have_no_labels(tmp_path):
    data = Tar(pack(tmp_path / "a.tar", {"all/1.png": png(1), "all/2.png": png(2)}))
    assert data.labels is None and data.classes is None
    with pytest.raises(UserError, match="per_class"):
        Tar(tmp_path / "a.tar", per_class=1)


def test_workers_and_pickled_copies_read_the_same(tmp_path):
    data = Tar(pack(tmp_path / "a.tar", {f"{k % 2}/{k}.png": png(k) for k in range(8)}))
    data.source(0)
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._open and copy.source(3) == data.source(3)
    options = dict(batch_size=4, total_steps=3, cache="none")
    for plain, shared in zip(batches(data, CROPS, **options), batches(data, CROPS, workers=2, **options)):
        assert torch.equal(plain.global_crops, shared.global_crops) and torch.equal(plain.labels, shared.labels)


def test_a_truncated_tar_file(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{k}.png": png(k, (60, 60)) for k in range(3)})
    data = Tar(path)
    path.write_bytes(path.read_bytes()[: data.places[2, 1] + 100])
    assert torch.equal(data.image(1), decode(png(1, (60, 60))))
    with pytest.raises(CorruptImage) as caught:
        data.image(2)
    assert caught.value.name == "a.tar/2.png" and "ends within" in caught.value.reason


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path / "none.tar", "does not exist"),
        (lambda path: path / "none-{00..03}.tar", "none-00.tar does not exist"),
        (lambda path: path, "no .tar files"),
        (lambda path: pack(path / "a.tar", {"readme.txt": b"x"}), "no images in a.tar; images are"),
        (lambda path: pack(path / "a.tar.gz", {"1.png": png(1)}, mode="w:gz"), "compressed"),
        (lambda path: (path / "a.tar").write_bytes(b"no" * 600) and path / "a.tar", "not a valid tar file"),
    ],
)
def test_unreadable_tar_files_give_one_line(tmp_path, make, words):
    with pytest.raises(UserError, match=words) as caught:
        Tar(make(tmp_path))
    assert "\n" not in str(caught.value)

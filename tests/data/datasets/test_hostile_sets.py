"""Untrusted datasets: no tar file, dataset folder or pickle writes outside its folder or runs code."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.datasets import DATASETS
from maskwise.errors import UserError


class Harm:
    """Pickle as a call that creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.fixture(autouse=True)
def unharmed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not os.path.exists("harm")


def png(value=9):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def packed(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (("good/1.png", tarfile.REGTYPE, ""), *members):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, target
            data = png() if kind == tarfile.REGTYPE else b""
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "member, words",
    [
        (("../../outside.png", tarfile.REGTYPE, ""), "contains a path outside its folder \\(../../outside.png\\)"),
        (("a/../../b.png", tarfile.REGTYPE, ""), "contains a path outside its folder \\(a/../../b.png\\)"),
        (("/etc/1.png", tarfile.REGTYPE, ""), "contains an absolute path \\(/etc/1.png\\); create it without -P"),
        (("good/2.png", tarfile.SYMTYPE, "/etc/passwd"), "contains a link \\(good/2.png -> /etc/passwd\\)"),
        (("good/3.png", tarfile.LNKTYPE, "good/1.png"), "contains a link \\(good/3.png -> good/1.png\\)"),
        (("good/4.png", tarfile.CHRTYPE, ""), "contains a special file"),
        (("good/5.png", tarfile.BLKTYPE, ""), "contains a special file"),
        (("good/6.png", tarfile.FIFOTYPE, ""), "contains a special file"),
    ],
)
def test_refused_tar_members(tmp_path, member, words):
    assert len(DATASETS["tar"](packed(tmp_path / "sound.tar", ("sub", tarfile.DIRTYPE, "")))) == 1
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=words) as caught:
        DATASETS["tar"](packed(tmp_path / "sound.tar", member))
    assert "\n" not in str(caught.value) and member[0] in str(caught.value) and sorted(os.listdir(tmp_path)) == before


def test_a_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../outside.png", png())
    for name in ("folder", "list", "tar"):
        with pytest.raises(UserError) as caught:
            DATASETS[name](tmp_path / "a.zip")
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["a.zip"]


def test_forged_tar_headers_give_one_line(tmp_path):
    whole = packed(tmp_path / "a.tar").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, 512, 1 + number % 4):
            data[place] = rng.integers(0, 256)
        if number % 2:  # with a corrected checksum
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data[:512])
        (tmp_path / "a.tar").write_bytes(data)
        try:
            result = DATASETS["tar"](tmp_path / "a.tar")
            assert len(result) == 1
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.slow
def test_a_dataset_script_is_not_run(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "pictures.py").write_text("import os\nos.mkdir('harm')\n")
    (folder / "1.png").write_bytes(png())
    try:
        assert len(DATASETS["huggingface"](str(folder))) == 1
    except UserError as error:
        assert "\n" not in str(error)


def test_images_of_the_datasets_library_use_our_decoder(tmp_path):
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (250, 2, 3)).save(buffer, "PNG", exif=exif)
    rows = [
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n", "path": None},
        {"bytes": png(), "path": None},
    ]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(str(tmp_path / "set"))
    data = DATASETS["huggingface"](str(tmp_path / "set"), max_pixels=30)
    assert data.image(0).shape == (3, 6, 5) and data.image(2).shape == (3, 5, 6)
    with pytest.raises(Exception, match="not an image in a format that can be read"):
        data.image(1)
    with pytest.raises(Exception, match="max_pixels=29"):
        DATASETS["huggingface"](str(tmp_path / "set"), max_pixels=29).image(0)


def test_a_pickle_among_torchvision_files_is_not_run(tmp_path):
    folder = tmp_path / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(Harm(), folder / name)
    with pytest.raises(UserError) as caught:
        DATASETS["torchvision"](tmp_path, "MNIST", "train")
    assert "\n" not in str(caught.value) and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match="CIFAR10 is not under"):
        DATASETS["torchvision"](tmp_path, "CIFAR10", "train")
    with pytest.raises(UserError, match="not plain pickled data"):
        from maskwise.data.benchmark_sets import cifar

        cifar.read(tmp_path)


def test_array_files_of_objects_or_wrong_sizes_are_refused(tmp_path):
    np.save("a.npy", np.array([Harm(), 1], dtype=object), allow_pickle=True)
    np.save("b.npy", np.zeros((4, 5, 3), np.uint8))
    data = bytearray((tmp_path / "b.npy").read_bytes())
    header = data.index(b"(4, 5, 3)")
    data[header : header + 15] = b"(4, 900000000, "
    (tmp_path / "c.npy").write_bytes(data)
    data[header : header + 15] = b"(__import__('os"
    (tmp_path / "d.npy").write_bytes(data)
    result = DATASETS["folder"](tmp_path, bits=16)
    assert [result.name(i) for i in range(len(result))] == ["a.npy", "b.npy", "c.npy", "d.npy"]
    assert result.image(1).shape == (3, 4, 5)
    for index in (0, 2, 3):
        with pytest.raises(Exception) as caught:
            result.image(index)
        assert type(caught.value).__name__ == "CorruptImage"

"""torchvision datasets, from miniature files in torchvision's layout."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from maskwise.compat import ready_torchvision
from maskwise.data.datasets import DATASETS
from maskwise.data.datasets.torchvision_sets import SETS, TorchvisionSet
from maskwise.errors import UserError

ready_torchvision()
import torchvision.datasets  # noqa: E402


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write CIFAR-10 batches of four images and disable torchvision's checksums of the real files."""
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "_check_integrity", lambda self: (tmp_path / self.base_folder).is_dir()
    )
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 3072)).astype(np.uint8)
    for k, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[k], "labels": [(4 * k + i) % 10 for i in range(4)]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return tmp_path, pixels


def test_cifar10(cifar):
    root, pixels = cifar
    data = DATASETS["torchvision"](path=root, set="cifar10", split="train")
    assert len(data) == 20 and data.labels.tolist() == [k % 10 for k in range(20)] and data.classes[9] == "truck"
    assert np.array_equal(data.image(5).numpy(), pixels[1, 1].reshape(3, 32, 32))
    assert np.array_equal(TorchvisionSet(root, "CIFAR10", "test").image(0).numpy(), pixels[5, 0].reshape(3, 32, 32))
    some = TorchvisionSet(root, "CIFAR10", "train", classes=["cat", "bird"], per_class=1)
    assert some.classes == ["bird", "cat"] and some.labels.tolist() == [0, 1] and some.name(1) == "CIFAR10/train/3"
    assert some.fingerprint() != data.fingerprint() == TorchvisionSet(root, "cifar10", "train").fingerprint()


def test_mnist_is_one_channel_or_three(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, data in (
            (f"{part}-images-idx3-ubyte", struct.pack(">IIII", 2051, 5, 28, 28) + pixels.tobytes()),
            (f"{part}-labels-idx1-ubyte", struct.pack(">II", 2049, 5) + bytes([4, 0, 9, 9, 1])),
        ):
            (raw / name).write_bytes(data)
            (raw / f"{name}.gz").write_bytes(gzip.compress(data))
    data = TorchvisionSet(tmp_path, "mnist", "test", channels=1)
    assert (
        data.labels.tolist() == [4, 0, 9, 9, 1]
        and np.array_equal(data.image(2).numpy(), pixels[2:3])
        and len(data.classes) == 10
    )
    assert TorchvisionSet(tmp_path, "mnist").image(0).shape == (3, 28, 28)
    assert (
        data.image(0).shape == (1, 28, 28)
        and TorchvisionSet(tmp_path, "mnist", bits=16, channels=1).image(1).numpy().max() == int(pixels[1].max()) * 257
    )


def test_a_dataset_of_class_folders(tmp_path):
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir(parents=True)
    for k, name in enumerate(("accordion", "airplanes")):
        folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        (tmp_path / "caltech101" / "Annotations" / name).mkdir(parents=True)
        for i in range(1, 3):
            Image.new("RGB", (6, 4), (k, i, 0)).save(folder / f"image_{i:04d}.jpg", quality=100)
    data = TorchvisionSet(tmp_path, "Caltech101")
    assert (
        len(data) == 4
        and data.labels.tolist() == [0, 0, 1, 1]
        and data.classes == ["accordion", "airplanes"]
        and data.image(3).shape == (3, 4, 6)
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"set": "cifar1"}, "no set 'cifar1'; did you mean CIFAR10"),
        ({"set": "CIFAR10"}, "CIFAR10 is not under .*nothing is downloaded"),
        ({"set": "MNIST", "split": "extra"}, "MNIST has train and test, not 'extra'"),
        ({"set": "SEMEION", "split": "train"}, "comes in one part"),
        ({"set": "STL10", "split": "nowhere"}, "data.split: STL10"),
    ],
)
def test_missing_parts_give_one_line(tmp_path, options, words):
    with pytest.raises(UserError, match=words) as caught:
        TorchvisionSet(tmp_path, **options)
    assert "\n" not in str(caught.value) and "download=True" not in str(caught.value)


def test_every_name_exists_in_torchvision():
    assert not [name for name in SETS if not hasattr(torchvision.datasets, name)]


def test_from_a_recipe(cifar):
    from maskwise import build
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe(
        "debug/tiny",
        "data.name=torchvision",
        f"data.path={cifar[0]}",
        "data.set=cifar10",
        "data.split=train",
        "data.test_split=test",
    )
    assert len(build.dataset(recipe)) == 20 and len(build.dataset(recipe, "test")) == 4

"""Datasets of the `datasets` library, written to disk by the library itself."""

import io
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskwise.data.datasets import DATASETS
from maskwise.errors import UserError


def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((4, 6, 3), k, np.uint8)) for k in range(6)]
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "eel"]),
            "note": datasets.Value("string"),
        }
    )
    table = datasets.Dataset.from_dict(
        {"picture": pictures, "kind": [0, 1, 2, 0, 1, 2], "note": list("abcabc")}, features=features
    )
    datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def test_a_column_of_raw_bytes(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": [b"\x89PNG", b"\x89PNG"]})
    table.save_to_disk(str(tmp_path / "bytes"))
    with pytest.raises(UserError, match=r"column image holds raw bytes; cast it to datasets.Image\(\)"):
        DATASETS["huggingface"](path=tmp_path / "bytes", image_column="image")


def test_a_saved_dataset(tmp_path):
    data = DATASETS["huggingface"](path=saved(tmp_path), split="train")
    assert len(data) == 6 and data.classes == ["cat", "dog", "eel"] and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.image(4).shape == (3, 4, 6) and int(data.image(4)[0, 0, 0]) == 4
    some = DATASETS["huggingface"](
        path=tmp_path / "set", split="train", classes=["eel", "dog"], per_class=1, channels=1
    )
    assert (
        some.labels.tolist() == [0, 1]
        and [int(some.image(i)[0, 0, 0]) for i in range(2)] == [1, 2]
        and some.image(0).shape == (1, 4, 6)
    )
    assert (
        data.fingerprint() != some.fingerprint()
        and len(DATASETS["huggingface"](path=tmp_path / "set", split="test")) == 2
    )
    words = DATASETS["huggingface"](path=tmp_path / "set", split="train", label_column="note")
    assert words.classes == ["a", "b", "c"] and words.labels.tolist() == [0, 1, 2] * 2


def test_missing_parts_give_one_line(tmp_path):
    path = saved(tmp_path)
    for options, words in (
        ({"split": "val"}, "no split 'val'; it has train, test"),
        ({"image_column": "kin"}, "no column kin; there are picture"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            DATASETS["huggingface"](path=path, **options)
        assert "\n" not in str(caught.value)


def test_tables_of_files_without_the_type_of_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    held = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 9, 9)).save(held, "PNG")
    rows = {"data": [{"bytes": held.getvalue(), "path": None}] * 2, "label": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "train.parquet"))
    data = DATASETS["huggingface"](tmp_path)
    assert data.image(1).shape == (3, 4, 6) and data.classes == ["a", "b"]
    datasets.Dataset.from_dict({"words": ["a"]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(
        UserError, match=r"no column of images; there are words \(Value\); name one as data.image_column"
    ):
        DATASETS["huggingface"](tmp_path / "words")


def single(tmp_path, split=None, **columns):
    """Save one Dataset, not a DatasetDict, of two images and the given columns."""
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((4, 6, 3), k, np.uint8)) for k in range(2)]
    table = datasets.Dataset.from_dict({"image": pictures, **columns}, split=split)
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "single"))
    return tmp_path / "single"


@pytest.mark.parametrize(
    "saved_as, accepted, words",
    [
        ("train", (None, "train"), "holds only the split 'train', not 'validation'"),
        ("test", (None, "test"), "holds only the split 'test', not 'validation'"),
        (None, (None, "train"), "holds one split without a name, not 'validation'"),
    ],
)
def test_a_saved_split_is_no_other_split(tmp_path, saved_as, accepted, words):
    path = single(tmp_path, split=saved_as)
    for split in accepted:
        assert len(DATASETS["huggingface"](path, split=split)) == 2
    with pytest.raises(UserError, match=words) as caught:
        DATASETS["huggingface"](path, split="validation")
    assert "\n" not in str(caught.value) and "data.test_path" in str(caught.value)


def test_the_split_that_is_taken_by_default(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_from_disk(str(single(tmp_path)))
    datasets.DatasetDict({"all": table}).save_to_disk(str(tmp_path / "one"))
    assert len(DATASETS["huggingface"](tmp_path / "one")) == 2
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match="no split 'train'; it has a, b"):
        DATASETS["huggingface"](tmp_path / "two")


def test_missing_labels_leave_a_set_without_labels(tmp_path):
    reason = r"column 'label' of .*single has no label in 1 of 2 rows \(the first: row 1\)"
    for k, values in enumerate((["cat", None], ["cat", ""], [3, -1], [3, None], [1.0, float("nan")])):
        path = single(tmp_path / str(k), label=values)
        data = DATASETS["huggingface"](path)
        assert data.labels is None and data.classes is None and len(data.notes) == 1
        with pytest.raises(UserError, match=f"^data.label_column: {reason}; label every row, or leave it out$"):
            DATASETS["huggingface"](path, label_column="label")
        with pytest.raises(UserError, match=f"^data.per_class needs labels, and {reason}$"):
            DATASETS["huggingface"](path, per_class=1)


@pytest.mark.parametrize(
    "values, labels, classes",
    [
        ([7, 3], [1, 0], ["3", "7"]),
        ([1.0, 0.0], [1, 0], ["0", "1"]),
        ([-1, 1], [0, 1], ["-1", "1"]),
        ([True, False], [1, 0], ["False", "True"]),
        (["b", "a"], [1, 0], ["a", "b"]),
        ([-1, -1], None, None),
        ([None, None], None, None),
        ([0.5, 1.5], None, None),
        ([[1], [2]], None, None),
    ],
)
def test_labels_without_class_names(tmp_path, values, labels, classes):
    data = DATASETS["huggingface"](single(tmp_path, label=values))
    assert (None if data.labels is None else data.labels.tolist()) == labels and data.classes == classes


def test_class_labels_that_are_missing_or_out_of_range(tmp_path):
    datasets = pytest.importorskip("datasets")
    for values, words in (([0, -1], "has no label in 1 of 2"), ([0, None], "has no label in 1 of 2")):
        table = datasets.load_from_disk(str(single(tmp_path, label=values)))
        table = table.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
        table.save_to_disk(str(tmp_path / "named"))
        data = DATASETS["huggingface"](tmp_path / "named")
        assert data.labels is None and words in data.notes[0]
        shutil.rmtree(tmp_path / "named"), shutil.rmtree(tmp_path / "single")


@pytest.fixture
def lookups(monkeypatch):
    """Refuse and record every look-up of a name."""
    names = []

    def refuse(*address, **options):
        names.append(address)
        raise OSError(101, "no network in this test")

    for function in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, function, refuse)
    return names


def test_no_network_although_the_library_was_imported_before(tmp_path, monkeypatch, lookups):
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    flags = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="no such folder, and the library's cache does not hold it"):
        DATASETS["huggingface"]("somebody/pictures")
    single(tmp_path)
    DATASETS["huggingface"]("single")
    assert lookups == [] and dict(os.environ) == environment
    assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == flags == (False, False)


@pytest.mark.parametrize("name", ["https://host.invalid/a.parquet", "hf://datasets/some/body/a.parquet"])
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_folder_whose_card_names_remote_files(tmp_path, lookups, name, card):
    pytest.importorskip("datasets")
    configs = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [{name}]\n"
    (tmp_path / card).write_text(f"---\n{configs}---\n# Pictures" if card == "README.md" else configs)
    with pytest.raises(UserError, match=f"{card} names data files on the network") as caught:
        DATASETS["huggingface"](tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value) and lookups == []


def test_a_folder_with_a_card_of_local_files(tmp_path, monkeypatch, lookups):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 6), (9, 9, 9)).save(folder / "cat" / "1.png")
    (folder / "README.md").write_text("---\nlicense_link: https://host.invalid/license\n---\n# Pictures\n")
    data = DATASETS["huggingface"](folder)
    assert len(data) == 1 and int(data.image(0)[0, 0, 0]) == 9 and lookups == []


def test_an_old_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    sys.modules["datasets"].__version__ = "3.6.0"
    with pytest.raises(UserError, match="needs datasets>=4, and 3.6.0 is installed"):
        DATASETS["huggingface"](tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the library `datasets`; pip install datasets"):
        DATASETS["huggingface"](path=tmp_path)

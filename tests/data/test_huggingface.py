"""Sets of the `datasets` library, written to disk by the library itself."""

import sys

import numpy as np
import pytest
from PIL import Image

from maskwise.data.datasets import DATASETS
from maskwise.functional.errors import UserError


def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((4, 6, 3), k, np.uint8)) for k in range(6)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "eel"]), "note": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 2, 0, 1, 2], "note": list("abcabc")}, features=features)
    datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def test_a_saved_set(tmp_path):
    data = DATASETS["huggingface"](path=saved(tmp_path), split="train")
    assert len(data) == 6 and data.classes == ["cat", "dog", "eel"] and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.image(4).shape == (3, 4, 6) and int(data.image(4)[0, 0, 0]) == 4
    some = DATASETS["huggingface"](path=tmp_path / "set", split="train", classes=["eel", "dog"], per_class=1, channels=1)
    assert some.labels.tolist() == [0, 1] and [int(some.image(i)[0, 0, 0]) for i in range(2)] == [1, 2] and some.image(0).shape == (1, 4, 6)
    assert data.fingerprint() != some.fingerprint() and len(DATASETS["huggingface"](path=tmp_path / "set", split="test")) == 2
    words = DATASETS["huggingface"](path=tmp_path / "set", split="train", label_column="note")
    assert words.classes == ["a", "b", "c"] and words.labels.tolist() == [0, 1, 2] * 2


def test_what_is_not_there_ends_in_one_line(tmp_path):
    path = saved(tmp_path)
    for options, words in (({"split": "val"}, "no split 'val'; it has train, test"), ({"image_column": "kin"}, "no column kin; there are picture")):
        with pytest.raises(UserError, match=words) as caught:
            DATASETS["huggingface"](path=path, **options)
        assert "\n" not in str(caught.value)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the library `datasets`; pip install datasets"):
        DATASETS["huggingface"](path=tmp_path)

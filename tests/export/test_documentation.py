"""docs/export.md: every example runs, on exports of small encoders."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from export.test_folder import build
from PIL import Image

import maskwise
from maskwise.export import folder

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
NEEDS = {"transformers": "transformers", "onnxruntime": "onnxruntime"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("documented")
    there = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    folder.write(build(), place / "exported", onnx=("pt2", "onnx") if there else ("pt2",))
    folder.write(build("simpool", class_token=False), place / "simpooled")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(code, place, monkeypatch):
    for word, library in NEEDS.items():
        if word in code:
            pytest.importorskip(library)
    monkeypatch.chdir(place)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    names = {"image": Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)), "pixels": pixels, "labels": torch.arange(4), "torch": torch, "np": np}
    exec(compile(code, str(PAGE), "exec"), names)
    if "simpool(" in code:
        wanted = maskwise.load("simpooled")(pixels)
        assert (names["vector"] - wanted.pooled).abs().max() < 1e-5 and (names["attention"] - wanted.attention[:, 0]).abs().max() < 1e-6
    if "pooled, patches" in code:
        assert np.abs(np.asarray(names["pooled"].detach() if hasattr(names["pooled"], "detach") else names["pooled"]) - maskwise.load("exported")(pixels).pooled.detach().numpy()).max() < 1e-5


def test_the_page_names_every_option():
    from maskwise.export import onnx
    from maskwise.export.folder import BACKBONE, MODEL, OWN, TRAINING

    text = PAGE.read_text(encoding="utf-8")
    for word in (BACKBONE, MODEL, OWN, TRAINING, *onnx.FILES.values(), "--weights", "--heads", "--private", "--revision", "--dry-run", "--licence", f"opset is {onnx.OPSET}"):
        assert word in text, word

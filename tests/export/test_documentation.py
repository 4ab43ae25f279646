"""docs/export.md: every example runs, on exports of small encoders."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskwise
from export.folder.test_folder import build
from maskwise.export import write

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
REQUIRED = {"transformers": "transformers", "onnxruntime": "onnxruntime"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("documented")
    has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    write.write(build(), place / "exported", onnx=("pt2", "onnx") if has_onnx else ("pt2",))
    write.write(build("simpool", class_token=False), place / "simpooled")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(code, place, monkeypatch):
    for word, library in REQUIRED.items():
        if word in code:
            pytest.importorskip(library)
    monkeypatch.chdir(place)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    names = {
        "image": Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)),
        "pixels": pixels,
        "labels": torch.arange(4),
        "torch": torch,
        "np": np,
    }
    exec(compile(code, str(PAGE), "exec"), names)
    if "simpool(" in code:
        expected = maskwise.load("simpooled")(pixels)
        assert (names["vector"] - expected.pooled).abs().max() < 1e-5
        assert (names["attention"] - expected.attention[:, 0]).abs().max() < 1e-6
    if "pooled, patches" in code:
        expected = maskwise.load("exported")(pixels).pooled.detach()
        assert (torch.as_tensor(names["pooled"]).detach() - expected).abs().max() < 1e-5


def test_the_page_names_every_option():
    from maskwise.export.folder import programs
    from maskwise.export.folder.format import BACKBONE, MODEL, OWN, TRAINING

    text = PAGE.read_text(encoding="utf-8")
    for word in (
        BACKBONE,
        MODEL,
        OWN,
        TRAINING,
        *programs.FILES.values(),
        "--weights",
        "--heads",
        "--private",
        "--revision",
        "--dry-run",
        "--license",
        f"opset is {programs.OPSET}",
    ):
        assert word in text, word

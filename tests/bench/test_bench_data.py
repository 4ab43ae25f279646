"""The bench of the data path in miniature, and what it is measured against."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.bench import data as bench
from maskwise.cli import main
from maskwise.functional.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_bench_data(folder, tmp_path, capsys):
    file = tmp_path / "data.json"
    words = ["--images", str(folder), "--workers", "1", "--batch", "2", "--blocks", "2", "--seconds", "0.05", "--json", str(file)]
    assert main(["bench", "data", "debug/tiny", *words]) == 0
    said = capsys.readouterr().out
    assert "x Pillow in img/s" in said and "uint8 crops" in said and "waits" in said
    found = json.loads(file.read_text())
    assert found["files"]["count"] == 6 and found["crops"]["global_size"] == 32 and found["decoder"] in found["decoders"]
    for name in ("maskwise", "pil"):
        assert len(found["loaders"][name]["images_per_second"]) == 2 and min(found["loaders"][name]["images_per_second"]) > 0
    expected = [a / b for a, b in zip(*(found["loaders"][name]["images_per_second"] for name in ("maskwise", "pil")))]
    assert found["ratio_images_per_second"] == pytest.approx(expected)
    assert {"decode, pil", "uint8 crops", "colour", "pil, all of it"} <= set(found["parts_ms"])
    assert all(0 <= share <= 1 for share in found["loader_and_colour"]["data_wait_share"])


def test_a_batch_larger_than_the_folder_is_one_line(folder):
    with pytest.raises(UserError, match="--batch 7"):
        bench.run(bench.parser().parse_args(["--images", str(folder), "--batch", "7"]))


def test_made_photographs_have_the_size_they_claim():
    made = script("natural_jpegs")
    files = [made.jpeg(0, k) for k in (0, 1)]
    for data in files:
        image = Image.open(io.BytesIO(data))
        assert image.size == (500, 375) and image.mode == "RGB" and 60_000 <= len(data) <= 70_000
        pixels = np.asarray(image, dtype=float)
        near = np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1]
        assert near > 0.8 and pixels.std() > 15  # neighbours are alike, as in photographs
    assert files[0] != files[1] and files[0] == made.jpeg(0, 0)


def test_the_baseline_makes_the_views_it_is_asked_for(folder):
    from maskwise.recipe import read_recipe

    baseline = script("pil_multicrop")
    crops = read_recipe("debug/tiny").crops
    views, _ = next(iter(baseline.loader(folder, 2, 0, crops)))
    assert [tuple(view.shape) for view in views] == [(2, 3, 32, 32)] * 2 + [(2, 3, crops.local_size, crops.local_size)] * crops.local_number
    white = baseline.to_float(Image.new("RGB", (4, 4), (255, 0, 128)))
    assert torch.allclose(white[:, 0, 0], torch.tensor([2.2489, -2.0357, 0.4265]), atol=1e-4)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(baseline.shift_hue(image, 0.0)), np.asarray(image.convert("HSV").convert("RGB")))
    assert [each.size for each in baseline.MultiCropFolder(folder, crops).geometry_only(0)][:2] == [(32, 32)] * 2

"""`maskwise bench data` in miniature, and its baseline."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.bench import data as bench
from maskwise.bench.baselines import natural_jpegs, pillow_multicrop
from maskwise.cli.main import main
from maskwise.data.decoding import jpeg
from maskwise.errors import UserError


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
    words = [
        "--images",
        str(folder),
        "--workers",
        "1",
        "--batch",
        "2",
        "--blocks",
        "2",
        "--seconds",
        "0.05",
        "--json",
        str(file),
    ]
    assert main(["bench", "data", "debug/tiny", *words]) == 0
    printed = capsys.readouterr().out
    assert "x Pillow in img/s" in printed and "uint8 crops" in printed and "waits" in printed
    available = [name for name in jpeg.PREFERRED if not jpeg.unavailable_reason(name)]
    [heading] = [line for line in printed.splitlines() if line.startswith("decoder, one core")]
    assert heading.split()[3:] == available, "a column per decoder"
    measured = json.loads(file.read_text())
    assert (
        measured["files"]["count"] == 6
        and measured["crops"]["global_size"] == 32
        and measured["decoder"] in measured["decoders"]
    )
    for name in ("maskwise", "pil"):
        assert (
            len(measured["loaders"][name]["images_per_second"]) == 2
            and min(measured["loaders"][name]["images_per_second"]) > 0
        )
    expected = [
        a / b for a, b in zip(*(measured["loaders"][name]["images_per_second"] for name in ("maskwise", "pil")))
    ]
    assert measured["ratio_images_per_second"] == pytest.approx(expected)
    assert {"decode, pil", "uint8 crops", "color", "pil, all of it"} <= set(measured["parts_ms"])
    assert all(0 <= share <= 1 for share in measured["loader_and_color"]["data_wait_share"])


def test_batch_larger_than_the_folder_is_a_one_line_error(folder):
    with pytest.raises(UserError, match="--batch 7"):
        bench.run(bench.parser().parse_args(["--images", str(folder), "--batch", "7"]))


def test_synthetic_photographs_have_the_stated_size():
    files = [natural_jpegs.jpeg(0, k) for k in (0, 1)]
    for data in files:
        image = Image.open(io.BytesIO(data))
        assert image.size == (500, 375) and image.mode == "RGB" and 60_000 <= len(data) <= 70_000
        pixels = np.asarray(image, dtype=float)
        near = np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1]
        assert near > 0.8 and pixels.std() > 15  # neighbors are alike, as in photographs
    assert files[0] != files[1] and files[0] == natural_jpegs.jpeg(0, 0)


def test_the_baseline_makes_the_views_of_the_recipe(folder):
    from maskwise.recipe.reading import read_recipe

    baseline = pillow_multicrop
    crops = read_recipe("debug/tiny").crops
    views, _ = next(iter(baseline.loader(folder, 2, 0, crops)))
    assert [tuple(view.shape) for view in views] == [(2, 3, 32, 32)] * 2 + [
        (2, 3, crops.local_size, crops.local_size)
    ] * crops.local_number
    views, _ = baseline.MultiCropFolder(folder, replace(crops, global_size=(24, 40), local_size=(8, 16)))[0]
    assert [tuple(view.shape) for view in views] == [(3, 24, 40)] * 2 + [(3, 8, 16)] * crops.local_number
    white = baseline.to_float(Image.new("RGB", (4, 4), (255, 0, 128)))
    assert torch.allclose(white[:, 0, 0], torch.tensor([2.2489, -2.0357, 0.4265]), atol=1e-4)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(baseline.shift_hue(image, 0.0)), np.asarray(image.convert("HSV").convert("RGB")))
    assert [view.size for view in baseline.MultiCropFolder(folder, crops).geometry_only(0)][:2] == [(32, 32)] * 2

"""`maskwise look`: sheets, pages and folders from images, folders and videos; mistakes in one line."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import maskwise
from maskwise import api
from maskwise.cli.main import main as run
from maskwise.errors import UserError
from support.looked import image, vit


def save(path, height=48, width=80, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image(height, width, number).permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        save(tmp_path / "photos" / f"{number}.png", 40 + 8 * number, 80, number)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    save(tmp_path / "a.png", 96, 160)
    frames = [Image.new("RGB", (40, 24), (level, 90, 200 - level)) for level in range(0, 200, 20)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported folder with a class token."""
    folder = tmp_path_factory.mktemp("model") / "model"
    maskwise.export(vit(), folder, say=None)
    return str(folder)


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('type="application/json">')[1].split("</script>")[0])


def test_a_folder_has_page_sheets_and_numbers(here, model, capsys):
    assert run(["look", model, "photos", "clip.gif", "a.png", "--out", "seen", "limit=3", "ratio=.25"]) == 0
    out, error = capsys.readouterr()
    assert out == "folder: seen\n"
    assert "photos: 3 of 6 images, evenly spread; limit=6 takes all" in error
    assert "clip.gif: 3 of 10 frames, evenly spread; limit=10 takes all" in error
    assert "broken.png cannot be read and is left out" in error
    names = ["0.png", "2.png", "clip_00000.png", "clip_00004.png", "clip_00009.png", "a.png"]
    assert {path.name for path in (here / "seen").iterdir()} == {*names, "look.html", "look.json"}
    data = data_of(here / "seen" / "look.html")
    assert [each["name"] for each in data["images"]] == [
        "0.png",
        "2.png",
        "clip 00000",
        "clip 00004",
        "clip 00009",
        "a.png",
    ]
    assert data["ratio"] == 25
    numbers = json.loads((here / "seen" / "look.json").read_text())
    last = numbers[-1]
    assert last["original"] == [96, 160] and last["size"] == [24, 40] and last["grid"] == [3, 5]
    assert last["masked"]["random"] == int(0.25 * 15)
    held = last["patches_of_mass"]["block 3"]
    assert len(held["heads"]) == 2 and 1 <= held["merged"] <= 9
    for x0, y0, x1, y1 in last["boxes"].values():
        assert 0 <= x0 < x1 <= 160 and 0 <= y0 < y1 <= 96 and x1 % 32 == 0 and y1 % 32 == 0


def test_a_sheet_and_a_page_of_whole_images(here, model):
    assert run(["look", model, "a.png", "--json", "a.json", "size=64"]) == 0
    one = np.array(Image.open("look.png"))
    assert one.shape[1] == 1280 and json.loads((here / "a.json").read_text())[0]["grid"] == [6, 10]
    api.look(maskwise.load(model), ["a.png", "photos/0.png"], "two.png", size=64)
    two = np.array(Image.open("two.png"))
    assert two.shape[0] > 1.8 * one.shape[0] and np.array_equal(two[40:200, 20:250], one[40:200, 20:250])
    options = ["masking=random", "mass=.4", "point=[.9,.1]"]
    assert run(["look", model, "a.png", "--out", "new/page.html", *options]) == 0
    data = data_of(here / "new" / "page.html")
    assert (data["masking"], data["mass"], data["point"]) == ("random", 40, [0.9, 0.1])


@pytest.mark.parametrize(
    "words, line",
    [
        (["gone.png"], "gone.png is not a file"),
        (["a.png", "--out", "a.jpg"], "a.jpg is no PNG, HTML or folder; end it with .png or .html"),
        (["a.png", "point=[2,0]"], r"point is \(2, 0\)|point is \[2, 0\]"),
        (["a.png", "limit=0"], "limit is 0; it must be a number of images"),
        (["a.png", "ratio=2"], "ratio is 2.0; it must be from 0 to 1"),
        (["a.png", "--out", "a.html", "blocks=true"], "the page has every block; leave them out"),
        (["a.png", "--out", "a.html", "masking=nothing"], "no masking nothing; there are none, random"),
        (["a.png", "--json", "no/a.json"], "--json no/a.json: its folder does not exist"),
        (["a.png", "--json", "a.json", "blocks=true"], "--json goes with whole images"),
        (["clip.mp4"], "cannot read the video clip.mp4"),
        (["empty"], "empty"),
        (["photos/broken.png"], "cannot read the image photos/broken.png"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(here, model, capsys, words, line):
    if words == ["clip.mp4"]:
        pytest.importorskip("cv2")
        (here / "clip.mp4").write_bytes(b"nothing")
    (here / "empty").mkdir()
    before = set(here.rglob("*"))
    assert run(["look", model, *words]) == 2
    error = capsys.readouterr().err

    assert re.search(line, error) and error.count("\n") == 1, error
    assert set(here.rglob("*")) == before


def test_a_model_without_attention_is_drawn_without_it(here):
    encoder = vit("gap")
    api.look(encoder, "a.png", "a.html")
    [facts] = data_of(here / "a.html")["images"]
    assert facts["layers"] == [] and "maps" not in facts["arrays"]
    assert {name for name in facts["arrays"] if name.startswith("mask_")} == {"mask_block", "mask_random"}
    api.look(encoder, "a.png", "a.png.png")
    with pytest.raises(UserError, match="gives no attention to mask by; attmask_hint needs it: choose random or block"):
        api.look(encoder, "a.png", "b.html", masking="attmask_hint")


MEASURE = """
import resource, sys, torch
from maskwise import api
from support.looked import image, vit
torch.set_num_threads(1)
encoder = vit(depth=6, heads=3, patch=16, size=64)
api.look(encoder, image(64, 64), sys.argv[1] + "/small.html")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
picture = image(96, 128).repeat(1, 8, 8)
api.look(encoder, picture, sys.argv[1] + "/large.html", size=896)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_of_a_large_image_is_not_that_of_all_attention(tmp_path):
    """3,136 patches: the matrices of six blocks and three heads would be 708 MB in float32."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(grown.stdout) / 1024 < 420, f"{int(grown.stdout) / 1024:.0f} MB"
    [facts] = data_of(tmp_path / "large.html")["images"]
    assert facts["grid"][0] * facts["grid"][1] == 48 * 65 and (tmp_path / "large.html").stat().st_size < 1_500_000

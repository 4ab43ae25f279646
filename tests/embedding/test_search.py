"""Search: neighbors by hand, another model's embeddings, pages, the command line."""

import json

import pytest
import torch
from PIL import Image

from maskwise import cli
from maskwise.build.embedding import search
from maskwise.data.datasets import Folder, Shapes
from maskwise.distributed.world import World
from maskwise.embedding.embed import embed
from maskwise.embedding.search import write_page
from maskwise.errors import UserError
from support.planted import Lookup, Pictures, gray
from support.tiny_sets import tiny_encoder


@pytest.fixture
def grays(tmp_path):
    """Embeddings whose vectors are angles of 0, 10, 20, 30 degrees, the third twice, and an image of 12 degrees."""
    degrees = torch.zeros(256)
    degrees[:5] = torch.tensor([0.0, 10.0, 20.0, 30.0, 12.0])
    angles = torch.deg2rad(degrees)
    net = Lookup(torch.stack([angles.cos(), angles.sin()], dim=1))
    embed(
        net, Pictures([gray(k) for k in (0, 1, 2, 2, 3)], [0, 1, 2, 2, 3]), tmp_path / "x.npy", name="x", world=World()
    )
    Image.fromarray(gray(4).permute(1, 2, 0).numpy()).save(tmp_path / "query.png")
    return net, tmp_path


@pytest.mark.parametrize("k", [3, 10])
def test_neighbors_by_hand(grays, k):
    net, folder = grays
    found = search(net, folder / "x.npy", [folder / "query.png"], k=k)
    expected = [(1, 2), (2, 8), (3, 8), (0, 12), (4, 18)][:k]  # row, degrees between; equal cosines by row
    (entry,) = found.table()
    assert [item["row"] for item in entry["neighbors"]] == [row for row, _ in expected]
    assert [item["label"] for item in entry["neighbors"]] == [[0, 1, 2, 2, 3][row] for row, _ in expected]
    cosines = torch.tensor([item["cosine"] for item in entry["neighbors"]], dtype=torch.float64)
    torch.testing.assert_close(
        cosines, torch.cos(torch.deg2rad(torch.tensor([float(d) for _, d in expected]).double())), atol=1e-6, rtol=0
    )


def test_embeddings_of_another_model_are_refused(grays):
    net, folder = grays
    net.anchor.data += 1
    with pytest.raises(UserError, match=r"was made by another model \(x\), so its vectors cannot be compared") as error:
        search(net, folder / "x.npy", [folder / "query.png"])
    assert "\n" not in str(error.value)


def test_another_transform_is_another_model(tmp_path):
    net = tiny_encoder()
    embed(net, Shapes(count=4, size=32), tmp_path / "x.npy", name="x", world=World())
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert len(search(net, tmp_path / "x.npy", [tmp_path / "a.png"]).rows[0]) == 4
    net.crop_pct = 0.5
    with pytest.raises(UserError, match="another model"):
        search(net, tmp_path / "x.npy", [tmp_path / "a.png"])


def test_command_line_and_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.limit_bank=null"]
    assert cli.main(["train", "debug/tiny", "--out", "run", *small]) == 0
    shapes = Shapes(count=6, size=40)
    for i in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(shapes.image(i).permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{i}.png")
    assert cli.main(["embed", "run", "photos", "--to", "x.csv"]) == 0
    capsys.readouterr()
    assert cli.main(["search", "run", "x.csv", "photos/2.png", "photos/4.png", "k=3", "--page", "page.html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "photos/2.png" and lines[1].split() == ["1", "1.0000", "2.png"] and lines[-1] == "page: page.html"
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 + 6 and "http" not in page
    assert cli.main(["search", "run", "x.csv", "photos/2.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["neighbors"][0]["path"] == "2.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    for words in (
        ["none.csv", "photos/2.png"],
        ["x.csv", "none.png"],
        ["x.csv", "broken.png"],
        ["x.csv", "photos/2.png", "k=0"],
    ):
        assert cli.main(["search", "run", *words]) == 2, words
        assert capsys.readouterr().err.count("\n") == 1
    found = search(tmp_path / "run", tmp_path / "x.csv", [tmp_path / "photos" / "0.png"])
    (tmp_path / "photos" / "5.png").unlink()
    write_page(found, tmp_path / "less.html", "less")
    assert "no image" in (tmp_path / "less.html").read_text()  # a file that is gone has no thumbnail


def test_folder_paths_are_found_from_anywhere(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20), (200, 10, 10)).save(tmp_path / "a.png")
    net = tiny_encoder()
    monkeypatch.chdir(tmp_path)
    embed(net, Folder("."), "x.npy", name="x", world=World())
    monkeypatch.chdir("/")
    found = search(net, tmp_path / "x.npy", [tmp_path / "a.png"])
    assert found.embeddings.picture(0).shape == (3, 20, 20)

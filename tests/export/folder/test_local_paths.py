"""Local paths: shortened wherever they stand, while names of the Hub, units and addresses stay."""

import importlib.util
import json
import re
import socket
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import maskwise
from export.folder.test_folder import build, run_folder
from maskwise.evaluation.report import Report
from maskwise.export import release
from maskwise.export.folder.local_paths import model_name, without_paths


@pytest.mark.parametrize(
    "given, expected",
    [
        ("/home/me/birds", "birds"),
        ("/home/me/my birds/", "my birds"),
        ("~/birds", "birds"),
        ("../birds/train", "train"),
        (r"C:\\Users\\me\\birds", "birds"),
        (r"\\\\server\\share\\birds", "birds"),
        ("file:///home/me/birds", "birds"),
        ("cache=/home/me/features every=2", "cache=features every=2"),
        ("cannot read /a/b/c.jpg: truncated", "cannot read c.jpg: truncated"),
        ("name:/a/b", "name:b"),
        ("'/a/b/c.jpg' and (/d/e.jpg)", "'c.jpg' and (e.jpg)"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("1281167 images / 1000 classes, img/s, 1/2", "1281167 images / 1000 classes, img/s, 1/2"),
        ("timm/vit_small_patch16_224", "timm/vit_small_patch16_224"),
        (7, 7),
        ({"/a/x.jpg": 1, "/b/x.jpg": ["/c/d"]}, {"x.jpg": 1, "x.jpg (2)": ["d"]}),
        ({"path": "data/mine/birds", "name": "a/b"}, {"path": "birds", "name": "a/b"}),
        ({"train": "1281167 images / 1000 classes"}, {"train": "1281167 images / 1000 classes"}),
        ({"start_from": "runs/mine/model.pth"}, {"start_from": "model.pth"}),
        ({"start_from": "mine/model.pth"}, {"start_from": "model.pth"}),
        ({"start_from": "hub:me/birds@main"}, {"start_from": "me/birds"}),
    ],
)
def test_paths_are_shortened(given, expected):
    assert without_paths(given) == expected


def test_the_home_folder_may_contain_spaces(monkeypatch):
    monkeypatch.setenv("HOME", "/home/My Name")
    assert without_paths("cache=/home/My Name/features/a") == "cache=a"


def test_a_model_on_disk_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name("me/birds") == "me/birds"
    (tmp_path / "me" / "birds").mkdir(parents=True)
    assert model_name("me/birds") == "birds" and model_name("hub:me/birds") == "me/birds"


def files_of(folder):
    """Yield the name and content of every file, and of every member of a zip archive."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield path.name, path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{path.name}: {name}", archive.read(name)) for name in archive.namelist())


@pytest.mark.parametrize("programs", [[], pytest.param(["onnx", "onnx-attention", "pt2"], marks=pytest.mark.slow)])
def test_nothing_exported_names_the_machine_or_the_user(tmp_path, monkeypatch, programs):
    """Paths are in the recipe, in its words, in the reports, their keys and their sentences, and in the programs."""
    run, home = tmp_path / "Secret Person" / "run", tmp_path / "Secret Person"
    monkeypatch.setenv("HOME", str(home))
    also = [f"knn cache={home}/features", "recall test=../undisclosed/sop every=2"]
    run_folder(run, evaluate={"also": also}, backbone={"name": "vit", "weights": "undisclosed/vit.pth"})
    recipe = json.loads((run / "recipe.yaml").read_text())
    recipe["data"] = {"name": "folder", "path": "undisclosed/birds", "test_path": r"D:\undisclosed\test"}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    corrupt = {
        f"{home}/photos/a.jpg": f"cannot read {home}/photos/a.jpg: truncated",
        "/undisclosed/b/a.jpg": "truncated",
    }
    Report({"top1": 1.0}, {"evaluation": "logistic"}, "feed", {}, corrupt).save(run / "reports" / "logistic.json")
    (run / "run.json").write_text(
        json.dumps({"host": "undisclosed-host", "command": "maskwise train undisclosed", "images": 7})
    )
    if importlib.util.find_spec("onnxscript") is None:
        programs = programs[2:]
    kinds = {"run": (run, {"heads": True, "onnx": programs}), "memory": (build("simpool"), {"reports": []})}
    here = [str(Path(maskwise.__file__).parents[2]), str(Path(torch.__file__).parents[1]), str(tmp_path)]
    words = ["Secret", "undisclosed", *here, *(word for word in (socket.gethostname(),) if len(word) > 5)]
    for kind, (model, options) in kinds.items():
        release.export(model, tmp_path / kind, say=None, **options)
        for name, content in files_of(tmp_path / kind):
            found = [word for word in words if word.encode() in content]
            assert not found, (kind, name, found)
            assert not re.search(rb"/[\w.-]+/[\w./-]+\.py\b", content), (kind, name)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["data"] == {"name": "folder", "path": "birds", "test_path": "test"}
    assert written["evaluate"]["also"] == ["knn cache=features", "recall test=sop every=2"]
    report = json.loads((tmp_path / "run" / "reports" / "logistic.json").read_text())
    assert report["corrupt"] == {"a.jpg": "cannot read a.jpg: truncated", "a.jpg (2)": "truncated"}

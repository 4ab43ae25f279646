"""Test that a recipe file alone never imports external code."""

import sys
from pathlib import Path

import pytest

import maskwise
from maskwise import cli
from maskwise.errors import UserError
from maskwise.process import external_code
from maskwise.recipe.reading import read_recipe

OWN = """
from pathlib import Path
from maskwise.data.datasets.shapes import Shapes
Path("imported").write_text("yes")
class Mine(Shapes):
    def __init__(self, count: int = 64, size: int = 40):
        super().__init__(count, size)
def factory(count: int = 64):
    Path("called").write_text("yes")
"""
TINY = [
    "data.count=64",
    "evaluate.knn_every=0",
    "train.epochs=1",
    "train.steps=2",
    "optimizer.warmup_epochs=0",
    "teacher.warmup_temp_epochs=0",
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make a folder on the import path with a module that records its import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MASKWISE_MODULES", raising=False)
    (tmp_path / "own_code.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text("extends: debug/tiny\ndata:\n  name: own_code:Mine\n")
    yield tmp_path
    sys.modules.pop("own_code", None)


def test_class_without_a_required_method_is_named(place, capsys):
    text = "from maskwise.nn.pooling import Pooling\nclass Half(Pooling):\n    gives_attention = True\n"
    (place / "own_code.py").write_text(text)
    assert cli.main(["train", "debug/tiny", "--out", "out", "pooling.name=own_code:Half", *TINY]) == 2
    error = capsys.readouterr().err
    assert error.endswith("`own_code:Half` does not implement pool, which its base class requires\n")
    assert error.count("\n") == 1 and not Path("out").exists()


def test_file_alone_imports_nothing(place, capsys):
    assert cli.main(["train", "r.yaml", "--out", "out", *TINY]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskwise: r.yaml:3: data.name: `own_code:Mine` is code") and error.count("\n") == 1
    assert "data.name=own_code:Mine" in error and "MASKWISE_MODULES=own_code" in error
    assert not Path("imported").exists() and not Path("out").exists()


def test_command_line_allows_import_and_the_run_continues(place):
    assert cli.main(["train", "r.yaml", "--out", "out", "data.name=own_code:Mine", *TINY, "train.steps=2"]) == 0
    assert Path("imported").exists()
    assert cli.main(["train", "r.yaml", "--out", "out", "data.name=own_code:Mine", *TINY]) == 0


def test_foreign_run_folder_imports_nothing(place, capsys):
    assert cli.main(["train", "debug/tiny", "--out", "out", "data=own_code:Mine", *TINY]) == 0
    sys.modules.pop("own_code")
    Path("imported").unlink()
    for words in (["evaluate", "knn", "out"], ["report", "out", "--measure"], ["show", "out"]):
        capsys.readouterr()
        assert cli.main(words) == 2
        assert "is code, and a recipe file alone does not import code" in capsys.readouterr().err
    assert cli.main(["report", "out"]) == 0, "the page of a run needs no code"
    assert not Path("imported").exists()


@pytest.mark.parametrize("allowed", ["own_code", "other, own_code", "other own_code"])
def test_environment_allows_modules(place, monkeypatch, allowed):
    monkeypatch.setenv("MASKWISE_MODULES", allowed)
    assert read_recipe("r.yaml").data.name == "own_code:Mine"
    monkeypatch.setenv("MASKWISE_MODULES", "own_cod")
    with pytest.raises(UserError):
        read_recipe("r.yaml")


@pytest.mark.parametrize(
    "section, name",
    [
        ("data", "os:system"),
        ("data", "subprocess:Popen"),
        ("pooling", "os:system"),
        ("masking", "builtins:exec"),
        ("method", "shutil:rmtree"),
    ],
)
def test_file_calls_nothing_in_the_standard_library(place, section, name):
    command = (
        "data:\n  name: os:system\n  command: touch called\n"
        if name == "os:system" and section == "data"
        else f"{section}:\n  name: {name}\n"
    )
    Path("evil.yaml").write_text(f"extends: debug/tiny\n{command}")
    with pytest.raises(UserError, match="is code, and a recipe file alone does not import code"):
        read_recipe("evil.yaml")
    assert not Path("called").exists()


@pytest.mark.parametrize("words", [(), ("optimizer.name=own_code:Mine",)])
def test_an_optimizer_is_never_imported(place, monkeypatch, words):
    monkeypatch.setenv("MASKWISE_MODULES", "own_code")
    Path("own.yaml").write_text("extends: debug/tiny\noptimizer: {name: 'own_code:Mine'}\n")
    with pytest.raises(UserError, match="no optimizer `own_code:Mine`; there are adamw, sgd, lars, lamb$"):
        read_recipe("own.yaml", *words)
    assert not Path("imported").exists()


def test_parent_recipe_imports_nothing_either(place):
    Path("child.yaml").write_text("extends: r.yaml\nseed: 3\n")
    with pytest.raises(UserError, match="r.yaml:3: data.name"):
        read_recipe("child.yaml")
    assert read_recipe("child.yaml", "data=shapes").data.name == "shapes"
    assert not Path("imported").exists()


def test_only_classes_are_called(place):
    for name in ("own_code:factory", "os:system"):
        with pytest.raises(UserError, match=f"`{name}` is no class"):
            read_recipe("debug/tiny", f"data={name}")
    for name in ("own_code:Absent", "absent:Mine", ":Mine", "own_code:"):
        with pytest.raises(UserError, match="cannot be imported"):
            read_recipe("debug/tiny", f"data.name='{name}'")
    assert not Path("called").exists()


def test_yaml_tags_create_no_objects(place):
    for tag in (
        "!!python/object/apply:os.system ['touch called']",
        "!!python/object/new:subprocess.Popen [[touch, called]]",
        "!!python/name:os.system",
    ):
        Path("tag.yaml").write_text(f"extends: debug/tiny\nseed: {tag}\n")
        with pytest.raises(UserError) as caught:
            read_recipe("tag.yaml")
        assert "\n" not in str(caught.value) and "tag.yaml:2" in str(caught.value)
        assert cli.main(["evaluate", "knn", "nowhere", f"k={tag}"]) == 2
    assert not Path("called").exists()


NETWORK = """
import torch
from torch import nn
class Small(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
    def forward(self, images):
        return self.stem(images).relu()
"""
NAMED = ["backbone.name=own_code:Small", "pooling.name=gap", "masking.name=none", "method.name=dino"]


def test_a_backbone_is_trained_and_loads_where_its_module_is_listed(place, monkeypatch, capsys):
    (place / "own_code.py").write_text(NETWORK)
    (place / "net.yaml").write_text("extends: debug/tiny\nbackbone: {name: 'own_code:Small'}\n")
    with pytest.raises(UserError, match="net.yaml:2: backbone.name: `own_code:Small` is code, and a recipe file alone"):
        read_recipe("net.yaml")
    assert cli.main(["train", "debug/tiny", "--out", "out", *NAMED, *TINY, "backbone.widht=12"]) == 2
    assert "nothing reads this key; did you mean `width`?" in capsys.readouterr().err
    assert cli.main(["train", "debug/tiny", "--out", "out", *NAMED, *TINY, "backbone.width=12"]) == 0
    monkeypatch.setattr(external_code, "_permitted", set())  # as in another process
    with pytest.raises(UserError, match="encoder.json: it names `own_code:Small`, which is code.* set MASKWISE_MOD"):
        maskwise.load("out")
    monkeypatch.setenv("MASKWISE_MODULES", "own_code")
    encoder = maskwise.load("out")
    assert encoder.dim == 12 and type(encoder.backbone.model).__name__ == "Small"

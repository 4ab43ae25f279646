"""Code that a recipe names: imported on the user's own word, never on a file's."""

import sys
from pathlib import Path

import pytest

from maskwise import cli
from maskwise.functional.errors import UserError
from maskwise.recipe import read_recipe

OWN = '''
from pathlib import Path
from maskwise.data.shapes import Shapes
Path("imported").write_text("yes")
class Mine(Shapes):
    def __init__(self, count: int = 64, size: int = 40):
        super().__init__(count, size)
def factory(count: int = 64):
    Path("called").write_text("yes")
'''
TINY = ["data.count=64", "evaluate.knn_every=0", "train.epochs=1", "train.steps=2", "optimizer.warmup_epochs=0", "teacher.warmup_temp_epochs=0"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder on the import path, with a module that tells when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MASKWISE_MODULES", raising=False)
    (tmp_path / "own_code.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text("extends: debug/tiny\ndata:\n  name: own_code:Mine\n")
    yield tmp_path
    sys.modules.pop("own_code", None)


def test_a_file_alone_imports_nothing(place, capsys):
    assert cli.main(["train", "r.yaml", "--out", "out", *TINY]) == 2
    said = capsys.readouterr().err
    assert said.startswith("maskwise: r.yaml:3: data.name: `own_code:Mine` is code") and said.count("\n") == 1
    assert "data.name=own_code:Mine" in said and "MASKWISE_MODULES=own_code" in said
    assert not Path("imported").exists() and not Path("out").exists()


def test_the_command_line_s_word_is_enough_and_the_run_goes_on(place):
    assert cli.main(["train", "r.yaml", "--out", "out", "data.name=own_code:Mine", *TINY, "train.steps=2"]) == 0
    assert Path("imported").exists()
    assert cli.main(["train", "r.yaml", "--out", "out", "data.name=own_code:Mine", *TINY]) == 0


def test_a_run_folder_from_elsewhere_imports_nothing(place, capsys):
    assert cli.main(["train", "debug/tiny", "--out", "out", "data=own_code:Mine", *TINY]) == 0
    sys.modules.pop("own_code")
    Path("imported").unlink()
    for words in (["evaluate", "knn", "out"], ["report", "out"], ["show", "out"]):
        capsys.readouterr()
        assert cli.main(words) == 2
        assert "is code, which a file alone does not get imported" in capsys.readouterr().err
    assert not Path("imported").exists()


@pytest.mark.parametrize("allowed", ["own_code", "other, own_code", "other own_code"])
def test_the_environment_may_allow_a_module(place, monkeypatch, allowed):
    monkeypatch.setenv("MASKWISE_MODULES", allowed)
    assert read_recipe("r.yaml").data.name == "own_code:Mine"
    monkeypatch.setenv("MASKWISE_MODULES", "own_cod")
    with pytest.raises(UserError):
        read_recipe("r.yaml")


@pytest.mark.parametrize("section, name", [("data", "os:system"), ("data", "subprocess:Popen"), ("pooling", "os:system"), ("masking", "builtins:exec"),
                                           ("method", "shutil:rmtree"), ("optimizer", "os:system")])
def test_nothing_of_the_standard_library_is_called_by_a_file(place, section, name):
    command = "data:\n  name: os:system\n  command: touch called\n" if name == "os:system" and section == "data" else f"{section}:\n  name: {name}\n"
    Path("evil.yaml").write_text(f"extends: debug/tiny\n{command}")
    with pytest.raises(UserError, match="is code, which a file alone does not get imported"):
        read_recipe("evil.yaml")
    assert not Path("called").exists()


def test_a_parent_recipe_s_word_is_a_file_s_word_too(place):
    Path("child.yaml").write_text("extends: r.yaml\nseed: 3\n")
    with pytest.raises(UserError, match="r.yaml:3: data.name"):
        read_recipe("child.yaml")
    assert read_recipe("child.yaml", "data=shapes").data.name == "shapes"
    assert not Path("imported").exists()


def test_what_is_no_class_is_not_called(place):
    for name in ("own_code:factory", "os:system"):
        with pytest.raises(UserError, match=f"`{name}` is no class"):
            read_recipe("debug/tiny", f"data={name}")
    for name in ("own_code:Absent", "absent:Mine", ":Mine", "own_code:"):
        with pytest.raises(UserError, match="cannot be imported"):
            read_recipe("debug/tiny", f"data.name='{name}'")
    assert not Path("called").exists()


def test_yaml_tags_make_no_objects(place):
    for tag in ("!!python/object/apply:os.system ['touch called']", "!!python/object/new:subprocess.Popen [[touch, called]]", "!!python/name:os.system"):
        Path("tag.yaml").write_text(f"extends: debug/tiny\nseed: {tag}\n")
        with pytest.raises(UserError) as caught:
            read_recipe("tag.yaml")
        assert "\n" not in str(caught.value) and "tag.yaml:2" in str(caught.value)
        assert cli.main(["evaluate", "knn", "nowhere", f"k={tag}"]) == 2
    assert not Path("called").exists()

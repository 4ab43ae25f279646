"""The tree: what a source root called ssl demands, and what the wheel and the launch scripts rest on."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ssl" / "maskwise"
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh")) + [ROOT / ".ci" / "run"]


def test_ssl_is_a_source_root_and_not_a_package():
    assert not (ROOT / "ssl" / "__init__.py").exists(), "ssl/__init__.py would hide Python's own ssl module"
    assert not (ROOT / "tests" / "ssl").exists(), "tests/ssl would hide Python's own ssl module"
    assert not list((ROOT / "ssl").glob("*.py"))


def test_standard_ssl_module_is_importable():
    code = "import ssl; print(ssl.__file__); ssl.SSLContext"
    for path in (ROOT, ROOT / "ssl", ROOT / "tests"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and str(ROOT / "ssl") not in done.stdout, done.stderr


def test_every_folder_of_the_package_is_a_package():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), (
            f"{folder.relative_to(ROOT)} has no __init__.py and would miss the wheel"
        )


def test_shipped_recipes_equal_those_of_the_repository():
    link = PACKAGE / "configs"
    assert link.resolve() == (ROOT / "configs").resolve()
    recipes = list((ROOT / "configs").rglob("*.yaml"))
    assert recipes and all(len(path.relative_to(ROOT / "configs").parts) == 2 for path in recipes), (
        "package data holds configs/*/*.yaml"
    )


def test_project_file_has_three_lines():
    assert len((ROOT / "pyproject.toml").read_text().strip().splitlines()) == 3


def test_metadata():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options"]["package_dir"].strip() == "= ssl"
    assert settings["options.entry_points"]["console_scripts"].strip() == "maskwise = maskwise.cli.main:main"
    assert settings["options"]["python_requires"] == ">=3.10"
    from maskwise import __version__

    assert settings["metadata"]["version"] == __version__
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert script.name == "env.sh" or os.access(script, os.X_OK), "chmod +x it"


def test_no_file_contains_paths_of_this_machine():
    import re

    machine = re.compile(r"(/home/\w+|/root/|/work/\w+|/Users/\w+|pypi\.org|files\.pythonhosted)")
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "configs").rglob("*.yaml"),
        *SCRIPTS,
        ROOT / "setup.cfg",
        *(ROOT / "docs").rglob("*.md"),
    ]:
        assert not machine.search(path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_wheel_holds_code_and_recipes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("ssl", "configs"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("maskwise-*.whl"))).namelist())
    for path in PACKAGE.rglob("*.py"):
        assert str(Path("maskwise") / path.relative_to(PACKAGE)) in names
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert str(Path("maskwise/configs") / path.relative_to(ROOT / "configs")) in names
    assert {f"maskwise/evaluation/look/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert (
        not {name.split("/")[0] for name in names}
        - {"maskwise"}
        - {name.split("/")[0] for name in names if ".dist-info" in name}
    )


LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()  # file:function, the reason stands beside the function
MANY_PARAMETERS = {"methods/student_teacher.py:__init__"}


def test_files_have_at_most_350_lines():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    long = {str(path.relative_to(ROOT)) for path in files if path.read_text(encoding="utf-8").count("\n") > 350}
    assert long == LONG_FILES


def test_functions_are_short_and_have_few_parameters():
    """At most 60 lines and 12 parameters, self aside."""
    long, many = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{path.relative_to(PACKAGE)}:{node.name}"
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.end_lineno - node.lineno + 1 > 60:
                    long.add(name)
                if len([argument for argument in arguments if argument.arg not in ("self", "cls")]) > 12:
                    many.add(name)
    assert long == LONG_FUNCTIONS
    assert many == MANY_PARAMETERS

"""Every text file is opened with an encoding: the default one is ASCII under LC_ALL=C."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = {"read_text", "write_text"}  # of pathlib
PIPES = {"text", "universal_newlines"}  # keywords of subprocess


def mode_of(call):
    """Return the mode of a call of open as text, "r" where it has none."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[1:2]
    return ast.unparse(given[0]) if given else "r"


def lacks_encoding(call):
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and "b" not in mode_of(call)
    if not isinstance(call.func, ast.Attribute):
        return False
    owner = ast.unparse(call.func.value)
    return call.func.attr in METHODS or owner == "subprocess" and bool(PIPES & keywords)


def missing(source, name):
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{name}:{call.lineno}: {ast.unparse(call)[:100]}" for call in calls if lacks_encoding(call)]


@pytest.mark.parametrize("folder", ["ssl", "launch"])
def test_text_files_are_opened_with_an_encoding(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [line for file in files for line in missing(file.read_text(encoding="utf-8"), file.relative_to(ROOT))] == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("open(path)", True),
        ("open(path, 'w', newline='')", True),
        ("open(path, mode='a')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.read_text()", True),
        ("path.write_text(text, 'utf-8')", True),  # by keyword, so that it can be checked
        ("path.write_text(text, encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, capture_output=True)", False),
        ("Image.open(path)", False),
    ],
)
def test_the_check_finds_missing_encodings(source, found):
    assert bool(missing(source, "x.py")) == found

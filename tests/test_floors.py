"""The floors: who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssl" / "maskwise"
GROUND = {"functional"}
ALLOWED = {
    "functional": {"functional"},
    "distributed": {"distributed", "functional.errors"},
    "data": GROUND | {"data"},
    "nn": GROUND | {"nn"},
    "methods": GROUND | {"nn", "methods"},
    "engine": GROUND | {"distributed", "engine"},
    "evaluation": GROUND | {"distributed", "data", "nn", "methods", "engine", "evaluation"},
    "export": GROUND | {"distributed", "data", "nn", "methods", "engine", "export"},
}
BUILDERS = {"recipe", "recipe_text", "recipe_schema", "recipe_sections", "recipe_contradictions", "recipe_code", "build", "labelled", "recipe_evaluations", "run_record", "verbs", "doctor", "starter", "bench", "listing"}
TOP = {"cli", "__main__", "__init__"}
FORBIDDEN_NAMES = {"utils", "util", "misc", "common", "helpers", "helper"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Full names of everything a module imports, wherever in it the import stands."""
    here = ("maskwise", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*here[: len(here) - node.level + 1], *([node.module] if node.module else []))) if node.level else node.module
            for alias in node.names:
                yield f"{base}.{alias.name}"


def owner(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_on_or_below_their_floor(path):
    floor = owner(path)
    inside = [name.removeprefix("maskwise.") for name in imports(path) if name.startswith("maskwise.")]
    if floor in TOP:
        return
    if floor in BUILDERS:
        above = [name for name in inside if name.split(".")[0] in ("cli", "__main__")]
        assert not above
        return
    for name in inside:
        parts = name.split(".")
        reachable = ALLOWED[floor]
        assert parts[0] in reachable or ".".join(parts[:2]) in reachable, f"{floor} may not import maskwise.{name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_speaks_of_torch_distributed(path):
    if owner(path) != "distributed":
        assert "torch.distributed" not in path.read_text(encoding="utf-8")


def test_every_module_has_a_floor():
    unknown = {owner(path) for path in MODULES} - set(ALLOWED) - BUILDERS - TOP
    assert not unknown, "give these a floor in DESIGN 3 and here"


def test_no_drawer_for_everything():
    named = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert not named & FORBIDDEN_NAMES
    assert not {path.stem for path in Path(__file__).parent.rglob("*.py")} & FORBIDDEN_NAMES

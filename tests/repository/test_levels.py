"""Import levels: each folder imports only from levels below its own, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ssl" / "maskwise"
GROUND = {"functional", "imaging", "errors", "process", "compat", "bounds", "storage"}
ALLOWED = {
    "errors": set(),
    "process": {"process"},
    "storage": {"storage", "errors", "process"},
    "bounds": set(),
    "compat": set(),
    "functional": {"functional", "errors"},
    "imaging": {"imaging", "errors"},
    "distributed": {"distributed", "errors", "process"},
    "data": GROUND | {"data"},
    "nn": GROUND | {"nn"},
    "methods": {"functional", "errors", "compat", "bounds", "nn", "methods"},
    "engine": {*GROUND, "distributed", "engine"},
    "evaluation": GROUND | {"distributed", "data", "nn", "methods", "engine", "evaluation"},
    "embedding": GROUND | {"distributed", "data", "nn", "engine", "evaluation", "embedding"},
    "export": GROUND | {"distributed", "data", "nn", "methods", "engine", "export"},
}
# composition: recipe and build above everything else, the commands above both
BUILDERS = {"recipe", "build"}
COMMANDS = {"api", "doctor", "bench", "report"}
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
            base = (
                ".".join((*here[: len(here) - node.level + 1], *([node.module] if node.module else [])))
                if node.level
                else node.module
            )
            for alias in node.names:
                yield f"{base}.{alias.name}"


def owner(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stay_on_or_below_their_level(path):
    level = owner(path)
    inside = [name.removeprefix("maskwise.") for name in imports(path) if name.startswith("maskwise.")]
    if level in TOP:
        return
    above = TOP | ({*COMMANDS} if level in BUILDERS else set())
    if level in BUILDERS | COMMANDS:
        assert not [name for name in inside if name.split(".")[0] in above]
        return
    for name in inside:
        parts = name.split(".")
        assert parts[0] in ALLOWED[level], f"{level} may not import maskwise.{name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_imports_torch_distributed(path):
    if owner(path) != "distributed":
        assert "torch.distributed" not in path.read_text(encoding="utf-8")


def test_every_module_has_a_level():
    unknown = {owner(path) for path in MODULES} - set(ALLOWED) - BUILDERS - COMMANDS - TOP
    assert not unknown, "give these a level here"


def test_no_module_has_a_catch_all_name():
    named = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert not named & FORBIDDEN_NAMES
    assert not {path.stem for path in Path(__file__).parents[1].rglob("*.py")} & FORBIDDEN_NAMES


def test_no_import_circles():
    """Module-level imports form no circle, packages' own re-exports aside."""
    modules = {".".join(("maskwise", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    packages = {name.removesuffix(".__init__") for name in modules if name.endswith(".__init__")}
    graph = {}
    for name, path in modules.items():
        names = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = {other for other in names if other in modules and other != name and other not in packages}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])

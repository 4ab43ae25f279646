"""The package changes no environment variable of the user's process, four places aside."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ssl" / "maskwise"
CHANGES = {"setdefault", "update", "pop", "popitem", "clear", "putenv", "unsetenv"}
ACCEPTED = {
    "engine/runtime.py",  # speed.deterministic: cuBLAS reads CUBLAS_WORKSPACE_CONFIG when it starts
    "engine/loggers/mlflow.py",  # telemetry off, in runs that log to MLflow
    "engine/loggers/wandb.py",  # error reports off, in runs that log to W&B offline
    "data/datasets/torchvision_sets.py",  # TORCH_FORCE_WEIGHTS_ONLY_LOAD, put back after reading
}


def changes(source):
    """Lines that assign or remove a variable of os.environ."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            targets = [node.func]
        lines += [
            node.lineno for target in targets if ast.unparse(target).startswith(("os.environ", "os.putenv", "os.unset"))
        ]
    return lines


def test_no_environment_variable_is_changed():
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if changes(path.read_text(encoding="utf-8"))
    }
    assert found == ACCEPTED


@pytest.mark.parametrize(
    "source, found",
    [
        ("import os\nos.environ['A'] = '1'", [2]),
        ("import os\nos.environ.setdefault('A', '1')", [2]),
        ("import os\ndel os.environ['A']", [2]),
        ("import os\nos.environ |= {'A': '1'}", [2]),
        ("import os\na = os.environ.get('A')", []),
        ("import os\ndict(os.environ).pop('A')", []),
    ],
)
def test_the_check_finds_changes(source, found):
    assert changes(source) == found

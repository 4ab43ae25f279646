"""What the code itself may not do: every place that could run a file's code, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [*(ROOT / "ssl" / "maskwise").rglob("*.py"), *(ROOT / "launch").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
)
NEVER = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "torch.hub.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "joblib.load",
    "runpy.run_path",
    "tarfile.extract",
    "shelve.open",
    "marshal.loads",
    "torch.jit.load",
}
# own workers' batches; the user's word and own tables
ONLY_IN = {
    "pickle.loads": {"shared_memory.py"},
    "importlib.import_module": {
        "external_code.py",
        "inspecting.py",
        "machine.py",
        "api.py",
        "implementation.py",
        "loggers/__init__.py",
    },
}
WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}


def name_of(function) -> str:
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([*([function.id] if isinstance(function, ast.Name) else ["?"]), *reversed(parts)])


def faults(text: str, file: str) -> list[str]:
    """The calls of a source that could run code out of a file."""
    calls = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, options = name_of(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in NEVER or name in ONLY_IN and file not in ONLY_IN[name]:
            calls.append(name)
        if name in WITH and (
            WITH[name][0] not in options or getattr(options[WITH[name][0]], "value", None) is not WITH[name][1]
        ):
            calls.append(name)
        if name == "yaml.load" and name_of(options.get("Loader", ast.Name(""))) not in (
            "TolerantLoader",
            "yaml.SafeLoader",
        ):
            calls.append(name)
        if name.endswith(".extractall") and "filter" not in ast.unparse(node):
            calls.append(name)
        if any(key == "shell" for key in options) or any(
            key == "trust_remote_code" and getattr(value, "value", True) for key, value in options.items()
        ):
            calls.append(f"{name} with a shell or remote code")
    return calls


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_package_never_executes_code_from_files(path):
    file = f"{path.parent.name}/{path.name}" if path.name == "__init__.py" else path.name
    assert faults(path.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=x)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "yaml.load(t, Loader=yaml.Loader)",
        "pickle.loads(b)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "tar.extractall(p)",
        "importlib.import_module(n)",
        "os.system(c)",
    ],
)
def test_scanner_detects_unsafe_calls(text):
    assert faults(text, "x.py")


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p, weights_only=True)",
        "np.load(p, allow_pickle=False)",
        "model.eval()",
        "re.compile(x)",
        "yaml.safe_load(t)",
        "tar.extractall(p, filter='data')",
    ],
)
def test_scanner_accepts_safe_calls(text):
    assert not faults(text, "x.py")

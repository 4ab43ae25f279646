"""Source of a number: a key of a file in docs/results, or a calculation over keys, as written on pages and in headers.

    quickstart.json: report.numbers.knn_teacher_pooled, 100 * share, median(turns), mean(runs["cifar/*"].numbers.top1)

Keys are joined by dots or written as ["key, with any letters"]; a key with * gives the list of all that match.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import operator
import re
import statistics
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from maskwise.bench import record

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILE = re.compile(r"([\w.-]+\.json):")
FUNCTIONS = {
    "median": statistics.median,
    "mean": statistics.mean,
    "spread": lambda values: (max(values) - min(values)) / 2,
    "min": min,
    "max": max,
    "sum": sum,
    "len": len,
}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


class SourceError(Exception):
    """A source that names no number; the text says why."""


def sources(text: str) -> list[tuple[str, ast.expr]]:
    """Return the file and expression of each source in a comment or in a header's line `raw`."""
    parts = FILE.split(text.strip())
    if parts[0].strip():
        raise SourceError(f"`{parts[0].strip()}` stands before the name of a file (NAME.json:)")
    found = []
    for name, listed in zip(parts[1::2], parts[2::2]):
        try:
            tree = ast.parse(f"({listed.strip().rstrip(';,')},)", mode="eval").body
        except SyntaxError as error:
            raise SourceError(f"{name}: {listed.strip()}: {error.msg}") from None
        found += [(name, expression) for expression in tree.elts]
    return found


@functools.cache
def content(path: Path) -> dict:
    """Return the content of a file of results, read once."""
    return record.read(path)


def value_of(name: str, expression: ast.expr) -> float:
    """Return the number that an expression has in a file of docs/results. Raises SourceError."""
    if not (RESULTS / name).is_file():
        raise SourceError(f"there is no docs/results/{name}")
    value = evaluate(expression, content(RESULTS / name))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SourceError(f"`{ast.unparse(expression)}` in {name} is {str(value)[:60]}, not a number")
    return value


def evaluate(node: ast.expr, root):
    """Evaluate an expression over what a file holds."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand, root)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left, root), evaluate(node.right, root))
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in FUNCTIONS:
        return FUNCTIONS[node.func.id](*(evaluate(argument, root) for argument in node.args))
    if isinstance(node, ast.Name):
        return root if node.id == "file" else entry(root, node.id)
    if isinstance(node, ast.Attribute):
        return entry(evaluate(node.value, root), node.attr)
    if isinstance(node, ast.Subscript):
        return entry(evaluate(node.value, root), ast.literal_eval(node.slice))
    raise SourceError(f"`{ast.unparse(node)}` is no key, function or calculation")


def entry(parent, key):
    """Return an entry; a key with * gives the list of all that match, and a key of such a list that of each."""
    if isinstance(parent, list) and isinstance(key, str):
        return [entry(item, key) for item in parent]
    if isinstance(parent, dict) and isinstance(key, str) and "*" in key:
        matching = [parent[name] for name in parent if fnmatch.fnmatchcase(name, key)]
        if matching:
            return matching
    try:
        return parent[key]
    except (KeyError, IndexError, TypeError):
        names = list(parent) if isinstance(parent, dict) else f"{len(parent)} items"
        raise SourceError(f"no key `{key}` among {str(names)[:200]}") from None


def shown(value: float, written: str) -> str:
    """Return a value with the decimals, commas and form of a written number."""
    digits, _, power = written.partition("e")
    places = len(digits.partition(".")[2])
    if power:
        mantissa = exact(value).scaleb(-int(power))
        return f"{shown(float(mantissa), digits)}e{power}"
    rounded = exact(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    text = f"{rounded:,f}" if "," in digits or abs(rounded) >= 10_000 else f"{rounded:f}"
    return text.replace("0.", ".", 1) if digits.lstrip("-").startswith(".") and abs(rounded) < 1 else text


def exact(value: float) -> Decimal:
    """Return a value without the last digits of binary arithmetic, so that halves are rounded up."""
    return Decimal(f"{value:.12g}")


def find(number: str, name: str) -> list[str]:
    """Return the keys of a file whose value, or 100 times of it, is shown as `number`."""

    def leaves(parent, path):
        items = parent.items() if isinstance(parent, dict) else enumerate(parent) if isinstance(parent, list) else ()
        for key, value in items:
            plain = isinstance(key, str) and key.isidentifier()
            inner = (f"{path}.{key}" if path else key) if plain else f"{path or 'file'}[{key!r}]"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield inner, value
            else:
                yield from leaves(value, inner)

    found = [(path, value) for path, value in leaves(record.read(RESULTS / name), "") if value == value]
    exact = [path for path, value in found if shown(value, number) == number]
    return exact + [f"100 * {path}" for path, value in found if shown(100 * value, number) == number]

"""Wording of the repository: words of the field, references to papers and own pages, short docstrings."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HISTORY = {"docs/log.md", "CHANGELOG.md"}
EARLIER = "ssl/maskwise/compat.py"  # names that files of earlier versions hold; the tests of these names quote them
QUAINT = (
    r"\b(foretells?|is told|are told|was told|were told|nobody|anew|sick|stands still|hastens?|lent|the judge|judged"
    r"|lessons?|speaks? of|dress(es|ed)?|wakes?|knocks?|wants? to know|so that nobody|of its own accord)\b"
)
OUTSIDE = (
    r"\b(attmask|pooling|evaluation|market|house|small|aesthetics)\.md\b|\bfacts? \d+\b|DESIGN(\.md)? \d"
    r"|the issue (asks|says)"
)


def tracked(*suffixes):
    """Tracked files with one of these suffixes, this test aside."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    if not any(names):  # a copy without its repository
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    skip = {"tests/repository/test_language.py"}
    return [name for name in names if name.endswith(suffixes) and name not in skip and "tests/fixtures" not in name]


def matches(pattern, names, flags=0):
    """Lines that match, as file:line: text."""
    lines = []
    for name in names:
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").split("\n"), start=1):
            if re.search(pattern, line, flags):
                lines.append(f"{name}:{number}: {line.strip()[:100]}")
    return lines


def test_references_lead_to_papers_or_pages_of_this_repository():
    assert matches(OUTSIDE, tracked(".py", ".md", ".yaml", ".cfg", ".sh")) == []


def test_words_of_the_field():
    names = [name for name in tracked(".py", ".md", ".yaml", ".sh") if name not in {EARLIER, *HISTORY}]
    assert matches(QUAINT, names, re.I) == []


def test_american_spelling():
    british = r"colour|\bgrey|normalis|initialis|optimis|neighbour|behaviour|\bcentre|licence|labelled|analyse\b"
    names = [name for name in tracked(".py", ".md", ".yaml", ".sh") if name not in {EARLIER, *HISTORY}]
    quoted = ("grey_prob", "normalise", "optimiser:")
    assert [
        line for line in matches(british, names, re.I) if not ("tests/" in line and any(q in line for q in quoted))
    ] == []


def test_lines_of_code_have_at_most_120_columns():
    assert matches(r"^.{121}", tracked(".py", ".sh", ".sbatch")) == []


def words(line):
    """Count the words of a docstring's first clause; a shape, a parenthesis or what follows a colon does not count."""
    clause = re.split(r"(?<=[^.])[:;] |; raises|\. ", re.sub(r"\[[^\]]*\]|\([^)]*\)", "S", line))[0]
    return len(clause.split())


MODULES = sorted((ROOT / "ssl" / "maskwise").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "ssl" / "maskwise")))
def test_docstrings_begin_with_a_noun_or_a_verb(path):
    """First lines are no relative clauses and have at most 20 words."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            first = text.split("\n")[0]
            assert not re.match(r"(What|Which|Who|Whose|Where|How|Whatever) ", first), first
            assert words(first) <= 20, first

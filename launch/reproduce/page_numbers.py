"""Compare the numbers on the pages and in recipe headers with docs/results: `python -m launch.reproduce.page_numbers`.

A table or paragraph names the source of each of its numbers, in reading order, in a comment below it:

    <!-- numbers
    quickstart.json: report.numbers.knn_teacher_pooled, 100 * share, seconds / 60, median(turns)
    -->

and a recipe's header in its line `raw`; README's comments are in docs/results/readme_sources.md. Keys of the JSON are
joined by dots or written as ["key, with any letters"], `*` stands for all keys; FUNCTIONS and + - * / ** combine them.
A number alone is a setting, allowed in text and in the first column of a table. --write corrects the digits on the
pages and the table of raw files; --find 45.9 FILE prints the keys whose value is shown as that number.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.reproduce import number_sources
from launch.reproduce.number_sources import FILE, SourceError, find, shown, sources, value_of
from maskwise.bench import record
from maskwise.recipe.yaml_text import header

ROOT = Path(__file__).parents[2]
README_SOURCES = "docs/results/readme_sources.md"  # the comments of README's blocks in order: it is kept short
PAGES = {  # the blocks of a page whose numbers must have a source: tables, or all text; of all sections or one
    "README.md": ("text", "Does it work?"),
    "docs/results.md": ("text", None),
    "docs/performance.md": ("table", None),
}
SOURCES = re.compile(r"<!-- numbers\s(.*?)-->", re.S)
UNMEASURED = "<!-- nothing measured -->"  # below a table of settings
NUMBER = re.compile(
    r"(?<![\w.,/@])(?<!\w-)-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?(?!\w|[.,]\d)"
)
NO_NUMBERS = re.compile(
    r"`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d|\b[0-9a-f]{7,12}\b|\b\d+\.\d+\.\d+\S*|\bk = \d+|\b\d+(?:-| )px\b"
    r"|\b(?:commit|torch|torchvision|torchcodec|timm|Python|Pillow|lightly) \S+"
)
RAW_FILES = "## Raw files"


@dataclass
class Block:
    """A paragraph or table of a page with its place, section, and the comment below it."""

    text: str
    start: int
    section: str
    comment: str = ""

    @property
    def is_table(self) -> bool:
        """Whether it is a table."""
        return self.text.startswith("|")

    def numbers(self) -> list[re.Match]:
        """Return the numbers in reading order; those of a table's head, of code, dates, versions do not count."""
        text = self.text
        if self.is_table:
            head = "\n".join(text.split("\n")[:2])
            text = " " * len(head) + text[len(head) :]
        return list(NUMBER.finditer(NO_NUMBERS.sub(lambda match: "." * len(match[0]), text)))

    def is_data(self, number: re.Match) -> bool:
        """Whether a number stands in a table, not in its first column."""
        return self.is_table and self.text[: number.start()].rpartition("\n")[2].count("|") > 1


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a Markdown page; code and headings are left out."""
    section, found = "", None
    hidden = re.sub(r"^```.*?^```", lambda match: re.sub(r"[^\n]", " ", match[0]), page, flags=re.S | re.M)
    for match in re.finditer(r"<!--.*?-->|(?:(?!<!--)[^\n]*\S[^\n]*(?:\n|\Z))+", hidden, re.S):
        text = match[0]
        if text.startswith("#"):
            section = text.partition("\n")[0].lstrip("# ")
        elif text.startswith("<!--"):
            if found:
                found.comment = text
        else:
            if found:
                yield found
            found = Block(text.rstrip("\n"), match.start(), section)
    if found:
        yield found


def sourced_blocks(page: str, name: str) -> list[Block]:
    """Return the blocks of a page whose numbers need sources, with their comments; README's are in a file apart."""
    only = PAGES[name][1]
    found = [
        block
        for block in blocks(page)
        if block.section != RAW_FILES.lstrip("# ") and (only is None or block.section == only)
    ]
    if name == "README.md":
        apart = re.findall(r"<!--.*?-->", (ROOT / README_SOURCES).read_text(encoding="utf-8"), re.S)
        measured = [block for block in found if block.numbers()]
        if len(apart) != len(measured):
            raise SourceError(f"{README_SOURCES} has {len(apart)} comments for {len(measured)} blocks of {name}")
        for block, comment in zip(measured, apart):
            block.comment = comment
    return found


def compared(numbers: list[str], text: str, place: str, data: list[bool]) -> tuple[list[str | None], list[str]]:
    """Return the right form of each number, and the mistakes: what `text` has for it, or that they are too few.

    data: whether a number stands in a cell of data, where a setting is no source.
    """
    try:
        named = sources(text)
    except SourceError as error:
        return [None] * len(numbers), [f"{place}: {error}"]
    right, wrong = [], []
    for number, is_data, (name, expression) in zip(numbers, data, named):
        try:
            if is_data and isinstance(expression, ast.Constant):
                raise SourceError(f"{ast.unparse(expression)} is no source; name a key of {name}")
            value = value_of(name, expression)
            right.append(shown(value, number))
            if right[-1] != number:
                wrong.append(f"{place}: {number} is {value:.10g} in {name}: {ast.unparse(expression)}")
        except (SourceError, ArithmeticError, TypeError, statistics.StatisticsError) as error:
            right.append(None)
            wrong.append(f"{place}: {number}: {error}")
    if len(named) != len(numbers):
        listed = [f"{name}: {ast.unparse(expression)}" for name, expression in named]
        lines = [f"{a or '-':>12}  {b or '-'}" for a, b in padded(numbers, listed)]
        count = f"{place}: {len(numbers)} numbers and {len(named)} sources; side by side:"
        return [None] * len(numbers), ["\n".join([count, *lines])]
    return right, wrong


def padded(one: list, other: list) -> list[tuple]:
    """Return pairs of two lists, the shorter one filled with None."""
    length = max(len(one), len(other))
    return list(zip(one + [None] * (length - len(one)), other + [None] * (length - len(other))))


def checked_page(page: str, name: str) -> tuple[str, list[str]]:
    """Return a page with corrected digits, and its mistakes."""
    kind, _ = PAGES[name]
    corrected, wrong, shift = page, [], 0
    linked = {}
    for block in blocks(page):
        linked.setdefault(block.section, set()).update(re.findall(r"\]\(results/([\w.-]+\.json)\)", block.text))
    for block in sourced_blocks(page, name):
        found, place = block.numbers(), f"{name}:{page.count(chr(10), 0, block.start) + 1}"
        written, comment = [match[0] for match in found], SOURCES.fullmatch(block.comment)
        if comment is None:
            if written and (kind == "text" or block.is_table) and block.comment != UNMEASURED:
                wrong.append(f"{place}: {', '.join(written)}: without a source; write <!-- numbers ... --> below")
            continue
        right, mistakes = compared(written, comment[1], place, [block.is_data(match) for match in found])
        wrong += mistakes
        if name.startswith("docs/"):
            missing = set(FILE.findall(comment[1])) - linked[block.section]
            wrong += [f"{place}: the section does not link results/{file}" for file in sorted(missing)]
        for match, number in zip(found, right):
            if number is not None and number != match[0]:
                start = block.start + match.start() + shift
                corrected = corrected[:start] + number + corrected[start + len(match[0]) :]
                shift += len(number) - len(match[0])
    return corrected, wrong


def checked_recipe(text: str, name: str) -> list[str]:
    """Return the mistakes in the cost and result of a recipe's header."""
    head = header(text)
    measured = [
        re.split(r"published|not yet", line)[0] for line in (head.cost, head.result)
    ]  # what follows is not ours
    numbers = [match[0] for line in measured for match in Block(line, 0, "").numbers()]
    if not head.raw:
        return [f"{name}: {', '.join(numbers)}: without a source; add a line `raw`"] if numbers else []
    return compared(numbers, head.raw, name, [False] * len(numbers))[1]


def raw_files() -> str:
    """Return the table of all raw files."""
    lines = ["| file | commit, date | machine | command, notes |", "|---|---|---|---|"]
    for path in sorted(number_sources.RESULTS.glob("*.json")):
        about = record.read(path)["record"]
        commits = ", ".join(
            f"`{commit[:7]}`" if commit else "not recorded" for commit in record.listed(about["commit"])
        )
        state = {True: "", False: " **with uncommitted changes**", None: " (changes not recorded)"}[about["clean"]]
        threads = about["threads"] if about["threads"] is not None else "not recorded"
        torch = " and ".join(record.listed(about["torch"] or "not recorded"))
        notes = "; ".join(filter(None, [about["command"] and f"`{about['command']}`", about.get("note")]))
        lines.append(
            f"| [{path.stem}](results/{path.name}) | {commits}{state}, {about['date']} | {about['hardware']}; threads: "
            f"{str(threads).strip('[]')}; torch {torch} | {notes or 'not recorded'} |"
        )
    return "\n".join(lines) + "\n"


def with_raw_files(page: str) -> str:
    """Return docs/results.md with the table of raw files as it must be; it ends the page."""
    before, title, after = page.partition(f"\n{RAW_FILES}\n")
    return f"{before}{title}{after.partition('| file |')[0]}{raw_files()}" if title else page


def check(write: bool = False) -> list[str]:
    """Return all mistakes; with `write` those in digits and in the table of raw files are corrected."""
    wrong = []
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        corrected, mistakes = checked_page(page, name)
        if name == "docs/results.md" and with_raw_files(page) != page:
            mistakes.append(f"{name}: the table of raw files differs from docs/results; run with --write")
            corrected = with_raw_files(corrected)
        wrong += mistakes
        if write and corrected != page:
            (ROOT / name).write_text(corrected, encoding="utf-8")
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        wrong += checked_recipe(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    return wrong


def main() -> int:
    """Check or correct the pages, or look for a number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="correct digits and the table of raw files")
    parser.add_argument("--find", nargs=2, metavar=("NUMBER", "FILE"))
    given = parser.parse_args()
    if given.find:
        print("\n".join(find(*given.find)) or f"no value of {given.find[1]} is shown as {given.find[0]}")
        return 0
    if given.write:
        check(write=True)
    wrong = check()
    print("\n".join(wrong) or "all numbers agree with docs/results")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

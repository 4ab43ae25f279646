"""The licences of what is installed along: `python -m benchmarks.licences [--write]` prints, or writes, docs/licences.md.

Read from the metadata of the installed packages; what setup.cfg declares and is not installed here keeps the row it has.
"""

from __future__ import annotations

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
FAMILIES = {"Apache": r"Apache", "MIT": r"\bMIT\b(?!-CMU)", "BSD": r"BSD", "HPND": r"HPND|MIT-CMU", "copyleft": r"GPL|Affero|MPL|EUPL|CDDL"}
HEAD = """# Licences

maskwise itself is Apache-2.0 (`LICENSE`). Nothing of other packages is copied into it; these are installed along, under the licence that each one's metadata states
(`python -m benchmarks.licences --write`; `tests/benchmarks/test_licences.py` holds the page to the declared dependencies and to what is installed).
Weights and data have licences of their own, which no package tells: an export's is `unknown` until it is stated.

| package | needed for | licence |
|---|---|---|
"""


def declared() -> dict[str, list[str]]:
    """Package -> what it is needed for: "running" or the extras that name it, as setup.cfg has them."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    found: dict[str, list[str]] = {}
    for what, lines in [("running", settings["options"]["install_requires"]), *settings["options.extras_require"].items()]:
        for line in lines.splitlines():
            if line.strip() and not line.startswith("#"):
                found.setdefault(re.split(r"[<>=!~\[ ]", line.strip())[0], []).append(what)
    return found


def stated(package: str) -> str | None:
    """The licence that an installed package's metadata states: its expression, its classifiers, or the first line of its text."""
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return None
    classifiers = [each.rpartition("::")[2].strip() for each in about.get_all("Classifier", []) if each.startswith("License ::")]
    text = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "not stated")


def families(licence: str) -> set[str]:
    """The families of licences that a statement names."""
    return {name for name, pattern in FAMILIES.items() if re.search(pattern, licence)}


def rows() -> dict[str, str]:
    """Package -> licence as the page has them."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[2] for row in cells if len(row) == 3 and row[0] != "package"}


def page() -> str:
    """The text of docs/licences.md."""
    known = rows()
    return HEAD + "".join(f"| {name} | {', '.join(what)} | {stated(name) or known.get(name, 'not looked up')} |\n" for name, what in declared().items())


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")

"""Print or write docs/licenses.md, the licenses of dependencies: `python -m launch.reproduce.licenses [--write]`.

Read from the metadata of installed packages; a declared package that is not installed keeps its present row.
"""

from __future__ import annotations

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "licenses.md"
FAMILIES = {
    "Apache": r"Apache",
    "MIT": r"\bMIT\b(?!-CMU)",
    "BSD": r"BSD",
    "HPND": r"HPND|MIT-CMU",
    "ISC": r"\bISC\b",
    "PSF": r"PSF|Python Software Foundation",
    "copyleft": r"GPL|Affero|MPL|EUPL|CDDL",
}
HEAD = """# Licenses

maskwise is licensed under Apache-2.0 (`LICENSE`) and contains no code of other packages. Its dependencies are installed
under the licenses that their metadata states. `python -m launch.reproduce.licenses --write` writes this table;
`tests/launch/test_licenses.py` compares it with setup.cfg and the installed packages.
Weights and data have their own licenses: the license of an export is `unknown` until you state it.

| package | needed for | license |
|---|---|---|
"""


def declared() -> dict[str, list[str]]:
    """Return {package: uses}, a use being "running" or an extra of setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    uses: dict[str, list[str]] = {}
    for use, lines in [
        ("running", settings["options"]["install_requires"]),
        *settings["options.extras_require"].items(),
    ]:
        for line in lines.splitlines():
            if line.strip() and not line.startswith("#"):
                uses.setdefault(re.split(r"[<>=!~\[ ]", line.strip())[0], []).append(use)
    uses.pop("maskwise", None)  # an extra that includes other extras
    return uses


def stated(package: str) -> str | None:
    """Return the license in a package's metadata: its expression, its classifiers, or the first line of its text."""
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return None
    classifiers = [
        line.rpartition("::")[2].strip() for line in about.get_all("Classifier", []) if line.startswith("License ::")
    ]
    text = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or ", ".join(classifiers) or (text[0] if text else "not stated")


def families(license: str) -> set[str]:
    """Return the license families that a statement names."""
    return {name for name, pattern in FAMILIES.items() if re.search(pattern, license)}


def rows() -> dict[str, str]:
    """Return {package: license} of the present page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[2] for row in cells if len(row) == 3 and row[0] != "package"}


def page() -> str:
    """Return the text of docs/licenses.md."""
    known = rows()
    return HEAD + "".join(
        f"| {name} | {', '.join(uses)} | {stated(name) or known.get(name, 'not looked up')} |\n"
        for name, uses in declared().items()
    )


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")

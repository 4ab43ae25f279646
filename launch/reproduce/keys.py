"""Write docs/keys.md, the reference of all recipe keys, from the signatures in the code.

python -m launch.reproduce.keys --write
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from maskwise.recipe.key_rows import KeyRow, key_rows

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
HEAD = """# Keys of a recipe

Every key that a recipe can hold, read from the signatures in the code by `python -m launch.reproduce.keys --write`; a
test compares this page with them. How recipes work and which ones are shipped: [recipes](recipes.md).
`maskwise list keys` prints the same rows, `maskwise show RECIPE` the values of a recipe with their places.

- **read by**: the names, such as `pooling.name`, or the methods with which a recipe may hold the key; empty: all.
- **default**: the value without the key; *required*: there is none; *timm's*: that of the named model.
- **source**: the file or folder below `ssl/maskwise/` that declares the key, its type, default and bounds.

Section backbone takes more arguments of timm's classes than those listed here. Classes of your own (`module:Name`)
bring the arguments of their constructors as keys.
"""
COLUMNS = ("key", "read by", "type", "default", "bounds", "meaning", "source")


def page() -> str:
    """Return the text of docs/keys.md."""
    parts = [HEAD]
    for section, rows in groupby(key_rows(), key=lambda row: row.section):
        parts.append(f"\n## {section}\n" if section else "\n## Outside sections\n")
        parts.append(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
        parts += [line(row) for row in rows]
    return "".join(parts)


def line(row: KeyRow) -> str:
    """Return a row of a table."""
    default = row.default if row.default in ("required", "timm's") else f"`{row.default}`"
    cells = (f"`{row.key}`", row.readers, row.type, default, row.bounds, row.meaning, row.source)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")

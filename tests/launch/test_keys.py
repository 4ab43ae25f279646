"""docs/keys.md is what the code declares, and README, the index and the site link it."""

import re
from pathlib import Path

import pytest

from launch.reproduce import keys
from maskwise.recipe.reading import file_layers, locate, shipped

ROOT = Path(__file__).parents[2]


def test_page_equals_the_signatures():
    assert keys.PAGE.read_text(encoding="utf-8") == keys.page(), "run `python -m launch.reproduce.keys --write`"


def test_every_key_of_every_shipped_recipe_is_on_the_page():
    listed = set(re.findall(r"^\| `([\w.]+)` \|", keys.PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    written = {key for name in shipped() for layer in file_layers(*locate(name))[0] for key in layer}
    assert len(written) > 60 and written <= listed


def test_every_row_has_all_cells():
    rows = [line for line in keys.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 200 and {line.count(" | ") for line in rows} == {len(keys.COLUMNS) - 1}


@pytest.mark.parametrize(
    "file, link", [("README.md", "(docs/keys.md)"), ("docs/index.md", "(keys.md)"), ("mkdocs.yml", " keys.md,")]
)
def test_page_is_linked(file, link):
    assert link in (ROOT / file).read_text(encoding="utf-8")

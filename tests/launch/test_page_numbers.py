"""Numbers on the pages and in recipe headers equal those of docs/results."""

import json
import re

import pytest

from launch.reproduce import dense_packs, evaluate_packs, number_sources, page_numbers, pooling_report
from launch.reproduce.number_sources import shown
from launch.reproduce.page_numbers import PAGES, ROOT, checked_page, checked_recipe
from launch.reproduce.tables.__main__ import STORIES
from launch.reproduce.tables.page import page
from launch.reproduce.tables.plan import chosen
from maskwise.bench import record

HEAD = {
    "command": "c",
    "commit": None,
    "clean": None,
    "date": None,
    "seed": 0,
    "hardware": None,
    "threads": 1,
    "torch": None,
}
CONTENT = {
    "record": HEAD,
    "top1": 38.85,
    "share": 0.3127,
    "seconds": 1032.15,
    "runs": {"a/0": {"top1": 40.0}, "a/1": {"top1": 41.0}, "a/2": {"top1": 43.5}, "b/0": {"top1": 7.0}},
    "loss": 2.6e-7,
    "turns": [3.0, 1.0, 2.0],
    "drop": -1.25,
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results of one file."""
    (tmp_path / "one.json").write_text(json.dumps(CONTENT))
    monkeypatch.setattr(number_sources, "RESULTS", tmp_path)
    monkeypatch.setitem(PAGES, "docs/page.md", ("text", None))
    return tmp_path


def mistakes(text):
    return checked_page(f"[raw](results/one.json)\n\n{text}", "docs/page.md")[1]


def test_numbers_of_all_pages_and_recipes_have_their_source():
    assert page_numbers.check() == []


def test_tables_beside_the_results_are_made_of_them():
    for name, profile in (("landscape_cpu", "cpu"), ("landscape_map", "map")):
        result = record.read(number_sources.RESULTS / f"{name}.json")
        assert (number_sources.RESULTS / f"{name}.md").read_text(encoding="utf-8") == pooling_report.table_text(
            result, profile
        )
    stored = record.read(number_sources.RESULTS / "evaluate_packs.json")
    assert (number_sources.RESULTS / "evaluate_packs.md").read_text(encoding="utf-8") == evaluate_packs.table(stored)
    stored = record.read(number_sources.RESULTS / "dense_packs.json")
    assert (number_sources.RESULTS / "dense_packs.md").read_text(encoding="utf-8") == dense_packs.table(stored)
    for name, story in STORIES.items():
        file = number_sources.RESULTS / f"{name}_table_cpu.json"
        if file.is_file():
            stored = record.read(file)
            settings = chosen(story.settings["cpu"], list(stored["settings"]))
            assert file.with_suffix(".md").read_text(encoding="utf-8") == page(stored, settings, story.title)


@pytest.mark.parametrize("name", PAGES)
def test_a_changed_digit_is_found_on_every_page(name):
    """Changes the first, a middle or the last digit of every fifth number, one at a time."""
    page, kinds = (ROOT / name).read_text(encoding="utf-8"), set()
    places = [
        (block.start + match.start(), match[0])
        for block in page_numbers.sourced_blocks(page, name)
        if page_numbers.SOURCES.fullmatch(block.comment)
        for match in block.numbers()
    ]
    assert len(places) > 10
    for count, (start, number) in enumerate(places[:: max(1, len(places) // 60)]):
        digits = [i for i, letter in enumerate(number.partition("e")[0]) if letter.isdigit()]
        place = start + digits[(count * (len(digits) - 1)) // 2 % len(digits)]
        other = str((int(page[place]) + 1 + count % 8) % 10)
        changed = page[:place] + other + page[place + 1 :]
        corrected, found = checked_page(changed, name)
        line = page.count("\n", 0, start) + 1
        assert found, f"{name}:{line}: {number} with {other} passes"
        kinds.add(corrected == page)
    assert True in kinds  # --write puts most of them right; a changed 1 of 1,024 can be another form


@pytest.mark.parametrize(
    "value, written, expected",
    [
        (38.85, "38.8", "38.9"),
        (35.65, "35.7", "35.7"),
        (1032.15, "1,000", "1,032"),
        (0.149999999999, ".3", ".1"),
        ((37.05 - 36.75) / 2, ".3", ".2"),
        (2.6e-7, "3e-7", "3e-7"),
        (1.386e-9, "1.4e-9", "1.4e-9"),
        (-1.25, "-1.2", "-1.3"),
        (0.55, "0.5", "0.6"),
        (27.0, "27.0", "27.0"),
        (12345.0, "9", "12,345"),
    ],
)
def test_values_as_pages_write_them(value, written, expected):
    assert shown(value, written) == expected


def test_calculations_over_keys(results):
    text = "Of 31.3 % in 17.2 minutes: 41.5, 1.75, 2, .25, -1.3, 2.6e-7, 4 runs.\n\n<!-- numbers one.json: "
    keys = (
        '100 * share, seconds / 60, mean(runs["a/*"].top1), spread(runs["a/*"].top1), median(turns), '
        'turns[1] / 4, drop, loss, len(runs["*"])'
    )
    assert mistakes(f"{text}{keys} -->") == []
    assert mistakes(f"{text}{keys.replace('/ 60', '/ 61')} -->") == [
        "docs/page.md:3: 17.2 is 16.92049180 in one.json: seconds / 61".replace("180 in", "18 in")
    ]


def test_numbers_without_a_source_and_sources_without_a_number(results):
    assert mistakes("top-1 38.9 with k = 20 at 32 px, `5`, 2026-11-29, commit 66055bd, torch 2.13") == [
        "docs/page.md:3: 38.9: without a source; write <!-- numbers ... --> below"
    ]
    [line] = mistakes("38.9 and 17\n\n<!-- numbers one.json: top1 -->")
    assert line.startswith("docs/page.md:3: 2 numbers and 1 sources; side by side:") and "17  -" in line
    assert mistakes("38.9\n\n<!-- numbers one.json: top2 -->") == [
        f"docs/page.md:3: 38.9: no key `top2` among {list(CONTENT)}"
    ]
    assert mistakes("38.9\n\n<!-- numbers two.json: top1 -->") == [
        "docs/page.md:3: 38.9: there is no docs/results/two.json",
        "docs/page.md:3: the section does not link results/two.json",
    ]
    assert mistakes("38.9\n\n<!-- numbers one.json: record.command -->") == [
        "docs/page.md:3: 38.9: `record.command` in one.json is c, not a number"
    ]


def test_a_setting_is_no_source_of_data(results):
    table = "| images | top-1 |\n|---|---|\n| 500 | 38.9 |\n\n<!-- numbers one.json: 500, {} -->"
    assert mistakes(table.format("top1")) == []
    assert mistakes(table.format("38.9")) == ["docs/page.md:3: 38.9: 38.9 is no source; name a key of one.json"]


def test_correction_keeps_form_and_rest(results):
    comment = "<!-- numbers one.json: seconds, 100 * share, loss -->\n"
    text = f"[raw](results/one.json)\n\n**1,000** s and 5.0 %, 3.4e-7.\n\n{comment}"
    corrected, found = checked_page(text, "docs/page.md")
    assert corrected == text.replace("1,000", "1,032").replace("5.0", "31.3").replace("3.4e-7", "2.6e-7")
    assert len(found) == 3 and checked_page(corrected, "docs/page.md") == (corrected, [])


def test_headers_of_recipes(results):
    header = "# T.\n#\n#   command  c\n#   cost     17 minutes (2026-11-21)\n#   result   38.9 %, published: 77.0\n"
    assert checked_recipe(header, "r.yaml") == ["r.yaml: 17, 38.9: without a source; add a line `raw`"]
    assert checked_recipe(f"{header}#   raw      one.json: seconds / 60,\n#            top1\n", "r.yaml") == []
    assert checked_recipe(f"{header}#   raw      one.json: seconds / 60, drop\n", "r.yaml") == [
        "r.yaml: 38.9 is -1.25 in one.json: drop"
    ]
    assert checked_recipe("# T.\n#\n#   result   not yet measured; published: k-NN 72.8\n", "r.yaml") == []


def test_find_gives_the_key(results):
    assert number_sources.find("38.9", "one.json") == ["top1"]
    assert number_sources.find("31.3", "one.json") == ["100 * share"]
    assert number_sources.find("43.5", "one.json") == ["runs['a/2'].top1"]


def test_files_with_changes_or_unknown_fields_are_named():
    rows = dict(re.findall(r"^\| \[([\w.-]+)\]\([^)]*\) \| (.*)$", page_numbers.raw_files(), re.M))
    for path in number_sources.RESULTS.glob("*.json"):
        about, row = record.read(path)["record"], rows[path.stem]
        assert ("with uncommitted changes" in row) == (about["clean"] is False)
        assert ("changes not recorded" in row) == (about["clean"] is None)
        assert ("threads: not recorded" in row) == (about["threads"] is None)

"""`maskwise list`: every row of every table, and nothing that the code does not hold."""

import pytest
import torch

from maskwise import cli
from maskwise.cli import tables as listing
from maskwise.errors import UserError
from maskwise.recipe.reading import shipped
from maskwise.recipe.schema import tables

NAMED = {"poolings": "pooling", "maskings": "masking", "methods": "method", "datasets": "data"}


@pytest.mark.parametrize("name", NAMED)
def test_table_lists_rows_with_keys_and_one_line(name):
    shown = listing.listing(name)
    table = tables()[NAMED[name]]
    assert [row[0] for row in shown.rows] == list(table)
    for row in shown.rows:
        assert len(row) == len(shown.columns) and row[-1].endswith(".") and len(row[-1]) < 250, row
        assert "\n" not in "".join(row)


def test_keys_are_those_that_a_recipe_accepts():
    from maskwise.recipe.reading import read_recipe

    for row in listing.listing("maskings").rows:
        accepted = read_recipe("debug/tiny", f"masking={row[0]}", try_model=False).masking.keywords()
        assert row[2] == (", ".join(accepted) or "-")
    rows = {row[0]: row for row in listing.listing("methods").rows}
    assert "pixel_weight" in rows["mst"][1] and "lambda2" in rows["ibot"][1] and "teacher_temp" not in rows["ibot"][1]
    assert {row[0]: row[1] for row in listing.listing("maskings").rows} == {
        "none": "no",
        "random": "no",
        "block": "no",
        "attmask_high": "yes",
        "attmask_low": "yes",
        "attmask_hint": "yes",
    }


def test_evaluations_and_their_options():
    from maskwise.evaluation import EVALUATIONS

    shown = listing.listing("evaluations")
    assert [row[0] for row in shown.rows] == list(EVALUATIONS)
    few = next(row for row in shown.rows if row[0] == "few_shot")
    assert (
        few[1] == "per_class, feature, temperature, batch_size"
        and few[2] == "Few-shot k-NN: accuracy with a few labeled images per class, as in AttMask."
    )
    assert all(row[-1].endswith(".") for row in shown.rows)


def test_recipes_with_what_was_published():
    rows = {row[0]: row[1:] for row in listing.listing("recipes").rows}
    assert list(rows) == shipped()
    assert rows["attmask/100pct_hint"][:2] == ("k-NN 72.8, linear 76.1", "") and rows["attmask/100pct_hint"][
        2
    ].startswith("iBOT + AttMask-Hint, ViT-S/16")
    assert rows["attmask/20pct_dino_low"][0] == "-"
    assert {name for name, row in rows.items() if row[1] == "not yet"} == set()


@pytest.mark.long
def test_backbones_by_family():
    shown = listing.listing("backbones")
    counts = {row[:2]: [int(number) for number in row[2].split(" of ")] for row in shown.rows}
    assert {("vision_transformer", "by blocks"), ("vision_transformer", "whole"), ("regnet", "whole")} <= set(counts)
    assert all(0 < one <= of for one, of in counts.values())
    assert sum(one for one, _ in counts.values()) > 1200 and "coat (" in shown.note
    from maskwise.nn import Backbone

    for row in shown.rows:
        with torch.device("meta"):
            assert Backbone(row[3].split(", ")[0]).dim > 0  # what is said to be supported is built


@pytest.mark.parametrize("name", ["poolings", "maskings", "methods", "datasets", "evaluations", "recipes"])
def test_a_terminal_gets_wrapped_columns_and_a_pipe_whole_lines(name):
    shown = listing.listing(name)
    piped = shown.text().splitlines()
    for row, line in zip(shown.rows, piped[1:]):
        assert line.startswith(row[0]) and line.endswith(row[-1]) and all(cell in line for cell in row)
    for width in (80, 120):
        lines = shown.text(width).splitlines()
        assert max(map(len, lines)) <= width
        assert sorted("\n".join(lines).split()) == sorted("\n".join(piped).split())  # every word, none twice
        starts = [line.split()[0] for line in lines[1:] if line and line[0] != " "]
        assert starts[: len(shown.rows)] == [row[0] for row in shown.rows]


def test_descriptions_are_whole_sentences_in_the_keys_of_recipes():
    rows = {row[0]: row[-1] for row in listing.listing("poolings").rows}
    assert rows["gap"] == "Global average pooling (SimPool, eq. B2)."
    assert all(text.count("(") == text.count(")") for text in rows.values())
    hint = {row[0]: row[-1] for row in listing.listing("maskings").rows}["attmask_hint"]
    assert hint.startswith("Masks as attmask_high, then")


def test_columns_are_aligned_and_the_widest_are_wrapped():
    made = listing.Listing(("a", "what"), [("x", "one two three four five six seven eight"), ("longer", "")], "end")
    assert made.text().splitlines() == [
        "a       what",
        "x       one two three four five six seven eight",
        "longer",
        "",
        "end",
    ]
    assert made.text(38).splitlines()[1:3] == ["x       one two three four five six", "        seven eight"]
    row = ("name of it", "one two three four five", "six seven eight nine ten eleven")
    assert listing.Listing(("name", "keys", "text"), [row]).text(50).splitlines() == [
        "name        keys                text",
        "name of it  one two three four  six seven eight",
        "            five                nine ten eleven",
    ]


def test_list_command(capsys):
    assert cli.main(["list"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == list(listing.LISTINGS)
    assert cli.main(["list", "maskings"]) == 0
    assert "attmask_hint  yes" in capsys.readouterr().out
    assert cli.main(["list", "masking"]) == 2
    assert capsys.readouterr().err == (
        "maskwise: no table `masking`; did you mean `maskings`?; tables are poolings, maskings, methods, backbones, "
        "datasets, evaluations, recipes, keys\n"
    )
    with pytest.raises(UserError):
        listing.listing("masks")

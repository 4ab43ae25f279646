"""`maskwise list`: every row of every table, and nothing that the code does not hold."""

import re

import pytest
import torch

from maskwise import cli, listing
from maskwise.functional.errors import UserError
from maskwise.recipe import shipped
from maskwise.recipe_schema import tables

NAMED = {"poolings": "pooling", "maskings": "masking", "methods": "method", "datasets": "data"}


@pytest.mark.parametrize("name", NAMED)
def test_a_table_lists_its_rows_with_their_keys_and_a_line(name):
    shown = listing.listing(name)
    table = tables()[NAMED[name]]
    assert [row[0] for row in shown.rows] == list(table)
    for row in shown.rows:
        assert len(row) == len(shown.columns) and row[-1].endswith(".") and len(row[-1]) < 250, row
        assert "\n" not in "".join(row)


def test_keys_are_those_that_a_recipe_accepts():
    from maskwise.recipe import read_recipe

    for row in listing.listing("maskings").rows:
        accepted = read_recipe("debug/tiny", f"masking={row[0]}", try_model=False).masking.keywords()
        assert row[2] == (", ".join(accepted) or "-")
    rows = {row[0]: row for row in listing.listing("methods").rows}
    assert "pixel_weight" in rows["mst"][1] and "lambda2" in rows["ibot"][1] and "teacher_temp" not in rows["ibot"][1]
    assert {row[0]: row[1] for row in listing.listing("maskings").rows} == {
        "none": "no", "random": "no", "block": "no", "attmask_high": "yes", "attmask_low": "yes", "attmask_hint": "yes",
    }  # fmt: skip


def test_evaluations_and_their_options():
    from maskwise.evaluation import EVALUATIONS

    shown = listing.listing("evaluations")
    assert [row[0] for row in shown.rows] == list(EVALUATIONS)
    few = next(row for row in shown.rows if row[0] == "few_shot")
    assert few[1] == "per_class, feature, temperature, batch_size" and few[2] == "Few-shot k-NN: how far a handful of labelled images per class goes."
    assert all(row[-1].endswith(".") for row in shown.rows)


def test_recipes_with_what_was_published():
    rows = {row[0]: row[1:] for row in listing.listing("recipes").rows}
    assert list(rows) == shipped()
    assert rows["attmask/100pct_hint"][:2] == ("k-NN 72.8, linear 76.1", "") and rows["attmask/100pct_hint"][2].startswith("iBOT + AttMask-Hint, ViT-S/16")
    assert rows["attmask/20pct_dino_low"][0] == "-"
    assert {name for name, row in rows.items() if row[1] == "not yet"} == set()


@pytest.mark.slow
def test_backbones_by_family():
    shown = listing.listing("backbones")
    counts = {row[0]: [int(number) for number in row[1].split(" of ")] for row in shown.rows}
    assert {"vision_transformer", "eva", "deit"} <= set(counts) and all(0 < one <= of for one, of in counts.values())
    from maskwise.nn import Backbone

    for row in shown.rows:
        with torch.device("meta"):
            assert Backbone(row[2].split(", ")[0]).dim > 0  # what is said to be supported is built


def test_columns_are_aligned_and_the_last_is_wrapped():
    made = listing.Listing(("a", "what"), [("x", "one two three four five six seven eight"), ("longer", "")], "end")
    assert made.text().splitlines() == ["a       what", "x       one two three four five six seven eight", "longer", "", "end"]
    assert made.text(38).splitlines()[1:3] == ["x       one two three four five six", "        seven eight"]


def test_the_verb(capsys):
    assert cli.main(["list"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == list(listing.LISTINGS)
    assert cli.main(["list", "maskings"]) == 0
    assert "attmask_hint  yes" in capsys.readouterr().out
    assert cli.main(["list", "masking"]) == 2
    assert capsys.readouterr().err == (
        "maskwise: no table `masking`; did you mean `maskings`?; tables are poolings, maskings, methods, backbones, datasets, evaluations, recipes\n"
    )
    with pytest.raises(UserError):
        listing.listing("masks")

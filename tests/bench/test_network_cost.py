"""Costs of whole networks, against sums by hand."""

import pytest
import torch

from maskwise.bench import network_cost
from maskwise.bench.map_tables import TABLES, Row
from maskwise.bench.network_cost import Timing, row_cost


def cost(label):
    return row_cost(next(row for row in TABLES["map6"] if row.label == label), None, 1000, None)


def test_two_more_groups_of_map_cost_what_their_layers_do():
    fewer, more = cost("2 x 4"), cost("4 x 4")
    width, embed, heads, tokens, pixels, entries = 384, 192, 6, 4, 14 * 14, 384 * 385 // 2
    queries = tokens + 1  # with the averaged token
    keys = queries + pixels
    weights = {
        "reduce": width * width + 2 * width,  # with a batch norm
        "expand": entries * width * tokens // 32 + 2 * width * tokens,
        "query": width * embed + embed,
        "keys, values": 2 * (width * embed + embed),
        "talking": 2 * (heads * heads + heads),
        "output": embed * width + width,
        "norms": 4 * width,
        "mlp": 2 * (4 * width * width // 2) + 5 * width,
        "head": tokens * width * 1000 + 1000 + 2 * tokens * width,
        "averaged head": width * 1000 + 1000 + 2 * width,
    }
    products = [
        width * width * pixels,
        entries * width * tokens // 32,
        queries * width * embed,
        2 * keys * width * embed,
        2 * heads * heads * queries * keys,
        queries * embed * width,
        2 * queries * (4 * width * width // 2),
        tokens * width * 1000,
    ]
    assert more["parameters"] - fewer["parameters"] == 2 * sum(weights.values())
    assert more["multiply_adds"] - fewer["multiply_adds"] == 2 * sum(products)
    between = width * width * pixels + 2 * queries * keys * embed  # Gramian matrix, attention
    assert more["attention_multiply_adds"] - fewer["attention_multiply_adds"] == 2 * between
    assert more["published"] == {"images_per_second": 2417, "parameters_m": None, "multiply_adds_g": 4.8, "top1": 81.0}


@pytest.mark.parametrize("recipe, classes, width", [("debug/tiny_supervised", 7, 7), ("debug/tiny", 7, 48)])
def test_a_recipe_has_its_classifier_and_size(recipe, classes, width, monkeypatch):
    calls = []
    monkeypatch.setattr(network_cost, "images_per_second", lambda *given: calls.append(given) or 12.5)
    timing = Timing(4, 0.5, torch.device("cpu"))
    row = row_cost(Row(recipe, recipe, ("backbone.depth=1",)), 48, classes, timing)
    (network, size, *rest), *_ = calls
    assert row["size"] == [48, 48] and size == (48, 48) and rest == [4, torch.device("cpu"), 0.5]
    assert network(torch.randn(2, 3, 48, 48)).shape == (2, width) and len(network.encoder.backbone.blocks) == 1
    assert row["images_per_second"] == 12.5 and row["parameters"] == sum(p.numel() for p in network.parameters())
    assert not network.training and not any(p.requires_grad for p in network.parameters())

"""Table 1 of the SimPool paper: each pooling in the parts of Algorithm 1 equals its own module."""

import pytest
import torch

from maskwise.bench import algorithm1
from maskwise.bench.table1 import TABLE1, parts_of
from maskwise.errors import UserError
from maskwise.nn import POOLINGS, Tokens
from maskwise.nn.pooling.simpool_ablations import merge_heads, split_heads

DIM, GRID = 8, (5, 7)
ROWS = [
    ("gap", {}),
    ("max", {}),
    ("gap_max", {}),
    ("gem", {}),
    ("lse", {}),
    ("how", {"variant": "paper"}),
    ("how", {"variant": "released"}),
    ("otk", {}),
    ("otk", {"variant": "released"}),
    ("otk", {"anchors": 5}),
    ("otk", {"anchors": 8, "variant": "released"}),
    ("kmeans", {"tolerance": 0.0}),
    ("kmeans", {"k": 6, "tolerance": 0.0, "iterations": 3}),
    ("slot", {}),
    ("slot", {"k": 5, "iterations": 2}),
    ("se", {"variant": "paper"}),
    ("se", {"variant": "released"}),
    ("cbam", {"variant": "paper"}),
    ("cbam", {"variant": "released"}),
    ("ge", {"variant": "paper"}),
    ("ge", {"variant": "released"}),
    ("vit", {"variant": "paper"}),
    ("vit", {"variant": "released"}),
    ("vit", {"num_heads": 1}),
    ("cait", {}),
    ("cait", {"blocks": 3}),
    ("simpool", {}),
    ("simpool", {"gamma": None}),
    ("simpool", {"gamma": 2.0, "num_heads": 4}),
    ("simpool", {"min_scope": "batch"}),
]


def pooling_and_patches(name, options):
    torch.manual_seed(0)
    pooling = POOLINGS[name](DIM, **options).double().eval()
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pooling, torch.randn(3, 35, DIM, dtype=torch.float64)


@pytest.mark.parametrize("name, options", ROWS, ids=str)
def test_algorithm_1_equals_the_module(name, options):
    pooling, x = pooling_and_patches(name, options)
    expected = pooling(Tokens(x, x[:, :0], GRID))
    u, attention = algorithm1.pool(x, *parts_of(pooling, GRID))
    torch.testing.assert_close(u.mean(1), expected.vector, atol=1e-10, rtol=1e-10)
    if expected.vectors is not None:
        torch.testing.assert_close(u, expected.vectors, atol=1e-10, rtol=1e-10)
    if expected.attention is not None:
        on_patches = attention[..., attention.shape[-1] - 35 :]  # without the query, where it is among the keys
        on_patches = on_patches / on_patches.sum(-1, keepdim=True) if name == "how" else on_patches
        torch.testing.assert_close(on_patches, expected.attention, atol=1e-10, rtol=1e-10)


def test_every_pooling_of_the_table_is_tested():
    assert set(TABLE1) == {POOLINGS[name] for name, _ in ROWS}
    names = "GAP Max GAPMax GeM LSE HOW OTK KMeans Slot SE CBAM GE ViT CaiT SimPool"
    assert {pooling.__name__ for pooling in TABLE1} == set(names.split())


def test_ablations_are_excluded_from_the_table():
    with pytest.raises(UserError, match="no row in Table 1"):
        parts_of(POOLINGS["simpool"](DIM, iterations=2), GRID)


def test_heads_are_queries_on_a_block_diagonal():
    """eq. B49: m heads are m queries of width D that are zero outside their block."""
    spread, gather = algorithm1.split(4)
    q = torch.arange(1.0, 9.0).view(1, 1, 8)
    expected = torch.tensor(
        [[1, 2, 0, 0, 0, 0, 0, 0], [0, 0, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 5, 6, 0, 0], [0, 0, 0, 0, 0, 0, 7, 8.0]]
    )
    z = torch.arange(32.0).view(1, 4, 8)
    merged = torch.tensor([[[0, 1, 10, 11, 20, 21, 30, 31.0]]])
    assert torch.equal(spread(q)[0], expected) and torch.equal(gather(z), merged)
    assert torch.equal(split_heads(q, 4)[0], expected) and torch.equal(merge_heads(z, 4), merged)

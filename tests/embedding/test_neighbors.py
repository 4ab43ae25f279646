"""Exact search: against all products in float64, over blocks and engines; components against SciPy."""

import itertools

import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from maskwise.embedding.neighbors import chosen_engine, components, pairs_above
from maskwise.errors import UserError


def rows(n, seed=0, dim=5):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def by_hand(left, right, threshold):
    """All pairs by a loop over float64 cosines."""
    found = {}
    for i, j in itertools.product(range(len(left)), range(len(right if right is not None else left))):
        if right is None and i >= j:
            continue
        a, b = left[i].double(), (left if right is None else right)[j].double()
        cosine = float(a @ b / (a.norm() * b.norm()))
        if cosine >= threshold:
            found[i, j] = cosine
    return found


def collected(*arguments, **options):
    found = {}
    for i, j, cosine in pairs_above(*arguments, **options):
        found |= {(a, b): value for a, b, value in zip(i.tolist(), j.tolist(), cosine.tolist())}
    return found


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("within", [True, False])
def test_all_pairs_and_no_others(engine, block, within):
    left, right = rows(40), None if within else rows(23, seed=1)
    expected = by_hand(left, right, 0.6)
    assert len(expected) > 20
    found = collected(left, right, 0.6, engine=engine, block=block)
    assert list(found) == sorted(expected)
    assert all(abs(found[pair] - expected[pair]) < 1e-6 for pair in expected)


def test_engines_and_blocks_agree_bit_for_bit_at_the_threshold():
    left = rows(30)
    left = torch.cat([left, left * 3.0, left[:5] + 1e-7])  # cosines of exactly one, and next to it
    results = [
        collected(left, None, t, engine=e, block=b) for e in ("torch", "faiss") for b in (4, 65) for t in (1 - 1e-7,)
    ]
    assert all(result == results[0] for result in results) and len(results[0]) >= 30


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_pairs_just_below_the_threshold_are_none(engine):
    cosines = (0.6 - 5e-5, 0.6 + 5e-5)
    left = torch.tensor([[1.0, 0.0], *([c, (1 - c * c) ** 0.5] for c in cosines)])
    assert list(collected(left, None, 0.6, engine=engine)) == [(0, 2), (1, 2)]


def test_rows_of_zeros_have_no_pairs():
    assert collected(torch.zeros(3, 4), None, 0.1) == {}


def test_an_unknown_engine_is_refused():
    with pytest.raises(UserError, match="engine=annoy is unknown; choose auto, torch or faiss"):
        chosen_engine("annoy")


def test_components_equal_scipys():
    generator = torch.Generator().manual_seed(3)
    for edges in (0, 5, 20, 60):
        pairs = [tuple(sorted(pair)) for pair in torch.randint(0, 50, (edges, 2), generator=generator).tolist()]
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        i, j = ([pair[k] for pair in pairs] for k in (0, 1))
        _, labels = connected_components(coo_matrix(([1] * len(pairs), (i, j)), shape=(50, 50)), directed=False)
        expected = {}
        for node, label in enumerate(labels.tolist()):
            expected.setdefault(label, []).append(node)
        expected = sorted(members for members in expected.values() if len(members) > 1)
        assert components(50, pairs) == expected

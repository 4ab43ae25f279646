"""The attention of one query, and its reduction to one map."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import attention


def test_row_equals_the_first_row_of_an_explicit_softmax():
    q, k = torch.randn(3, 4, 50, 16, dtype=torch.float64), torch.randn(3, 4, 50, 16, dtype=torch.float64)
    whole = torch.softmax(q @ k.transpose(-1, -2) * 16**-0.5, dim=-1)
    row = attention.cls_attention(q[:, :, 0], k, 16**-0.5)
    assert row.shape == (3, 4, 50) and torch.allclose(row, whole[:, :, 0], rtol=0, atol=1e-14)
    assert torch.allclose(row.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_row_stays_float32_under_autocast_and_from_bfloat16():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 3, 20, 8)
    plain = attention.cls_attention(q, k, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention.cls_attention(q, k, 0.3), plain)
    low = attention.cls_attention(q.bfloat16(), k.bfloat16(), 0.3)
    assert low.dtype == torch.float32 and torch.equal(
        low, attention.cls_attention(q.bfloat16().float(), k.bfloat16().float(), 0.3)
    )


def test_head_mean_is_not_renormalized():
    """A head that attends to the class token has little weight in the mean over patches."""
    heads = torch.tensor([[[0.05, 0.03], [0.2, 0.7]]])
    assert torch.allclose(attention.mean_heads(heads), torch.tensor([[0.125, 0.365]]))


def test_patch_attention_is_the_mean_over_heads_or_the_maximum_over_queries():
    maps = torch.rand(2, 3, 5).bfloat16()
    assert attention.patch_attention(maps).dtype == torch.float32
    assert torch.equal(attention.patch_attention(maps), maps.float().mean(1))
    assert torch.equal(attention.patch_attention(maps, queries=3), maps.float().amax(1))


def test_mass_mask_by_hand_and_against_the_cumulated_sum_from_below():
    rows = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert attention.mass_mask(rows, 0.6).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert attention.mass_mask(rows, 0.7).tolist()[0] == [False, True, False, True]  # exactly .7
    assert attention.mass_mask(rows, 0.71).tolist()[0] == [False, True, True, True]
    assert attention.mass_mask(rows[:1] * 3, 0.6).tolist() == [[False, True, False, True]]  # of the row's own sum
    assert not attention.mass_mask(rows, 0.0).any()
    assert attention.mass_mask(torch.tensor([[0.5, 0.0, 0.5]]), 1.0).tolist() == [[True, False, True]]
    drawn = torch.rand(20, 49, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for share in (0.1, 0.6, 0.93):
        found = attention.mass_mask(drawn, share)
        values, order = drawn.sort(dim=1)  # DINO's visualization: ascending, kept above 1 - share
        expected = torch.zeros_like(found).scatter_(1, order, values.cumsum(1) > 1 - share)
        assert torch.equal(found, expected)
        held = (drawn * found).sum(1)
        fewest = [int((row.sort(descending=True).values.cumsum(0) < share).sum()) + 1 for row in drawn]
        assert (held >= share).all() and found.sum(1).tolist() == fewest
    with pytest.raises(UserError, match="a share of 1.2"):
        attention.mass_mask(rows, 1.2)

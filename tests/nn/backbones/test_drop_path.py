"""Stochastic depth with per-sample keys."""

import pytest
import torch

from maskwise.functional import keyed_random
from maskwise.nn import Backbone
from maskwise.nn.backbones.drop_path import DropPath


def test_rates_grow_linearly_from_zero():
    assert DropPath(12, 0.1).rates == pytest.approx([i * 0.1 / 11 for i in range(12)])
    assert DropPath(12, 0.1).rates[1] == pytest.approx(0.00909, abs=1e-5)
    assert DropPath(1, 0.1).rates == [0.0]


def test_factors_have_mean_one_and_kept_branches_are_scaled():
    drop, like = DropPath(3, 0.4), torch.zeros(1)
    factors = drop(20_000, like, keyed_random.make_key(1, torch.arange(20_000)))[..., 0, 0]
    assert factors.shape == (3, 2, 20_000)
    assert factors[0].eq(1).all()
    for i, keep in ((1, 0.8), (2, 0.6)):
        assert factors[i].unique().tolist() == pytest.approx([0, 1 / keep])
        assert factors[i].mean(-1).tolist() == pytest.approx([1, 1], abs=0.03)
    dropped = factors[2].eq(0).double()
    assert abs(torch.corrcoef(dropped)[0, 1]) < 0.03  # the branches of a block are drawn independently


def test_equal_keys_give_equal_paths_for_any_split_of_the_batch():
    torch.manual_seed(0)
    backbone = (
        Backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, drop_path=0.6)
        .double()
        .train()
    )
    x, key = (
        torch.randn(6, 3, 16, 16, dtype=torch.float64),
        keyed_random.make_key(keyed_random.DROP_PATH, 0, 5, torch.arange(6), 0),
    )
    whole = backbone(x, drop_key=key).patches
    parts = torch.cat([backbone(x[i : i + 2], drop_key=key[i : i + 2]).patches for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    assert torch.equal(backbone(x, drop_key=key).patches, whole)
    assert not torch.equal(backbone(x, drop_key=key + 1).patches, whole)
    assert torch.equal(DropPath(3, 0.6)(6, x, key)[:, :, 2:4], DropPath(3, 0.6)(2, x, key[2:4]))


def test_eval_and_rate_zero_drop_nothing():
    assert DropPath(3, 0.5).eval()(2, torch.zeros(1)) is None
    assert DropPath(3, 0.0)(2, torch.zeros(1)) is None
    assert DropPath(3, 0.5)(2, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64

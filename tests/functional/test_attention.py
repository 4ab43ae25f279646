import torch
from maskwise.functional import attention


def test_row_equals_the_first_row_of_an_explicit_softmax():
    q, k = torch.randn(3, 4, 50, 16, dtype=torch.float64), torch.randn(3, 4, 50, 16, dtype=torch.float64)
    whole = torch.softmax(q @ k.transpose(-1, -2) * 16**-0.5, dim=-1)
    row = attention.cls_row(q[:, :, 0], k, 16**-0.5)
    assert row.shape == (3, 4, 50) and torch.allclose(row, whole[:, :, 0], rtol=0, atol=1e-14)
    assert torch.allclose(row.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_row_stays_float32_under_autocast_and_from_bfloat16():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 3, 20, 8)
    plain = attention.cls_row(q, k, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention.cls_row(q, k, 0.3), plain)
    low = attention.cls_row(q.bfloat16(), k.bfloat16(), 0.3)
    assert low.dtype == torch.float32 and torch.equal(low, attention.cls_row(q.bfloat16().float(), k.bfloat16().float(), 0.3))


def test_head_mean_is_not_renormalised():
    """Fact 47: a head that looks at its class token has little to say about patches, and says little."""
    heads = torch.tensor([[[0.05, 0.03], [0.2, 0.7]]])
    assert torch.allclose(attention.mean_heads(heads), torch.tensor([[0.125, 0.365]]))

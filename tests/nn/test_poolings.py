"""The contract that every row of POOLINGS obeys (DESIGN.md 5)."""

import pytest
import torch

from maskwise.functional.errors import UserError
from maskwise.nn import CLS, POOLINGS, Pooled, Tokens

ROWS = [("cls", {}), ("simpool", {}), ("simpool", {"gamma": None}), ("simpool", {"gamma": 2.0, "num_heads": 2, "beta": True}), ("simpool", {"gamma": 5.0})]
DIM, HEADS = 8, 2


def given(batch, grid, dtype=torch.float64, zero=False):
    generator = torch.Generator().manual_seed(3)
    count = grid[0] * grid[1]

    def draw(*shape):
        return torch.zeros(shape, dtype=dtype) if zero else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    row = draw(batch, HEADS, count + 1).softmax(-1)[..., 1:]
    return Tokens(draw(batch, count, DIM).requires_grad_(), draw(batch, 1, DIM).requires_grad_(), grid, row)


def one(tokens, i):
    return Tokens(tokens.patches[i : i + 1], tokens.prefix[i : i + 1], tokens.grid, tokens.cls_attention[i : i + 1])


@pytest.mark.parametrize("name, options", ROWS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (6, 6), (5, 7), (14, 14)])
@pytest.mark.parametrize("batch", [1, 5])
def test_row_of_the_table(name, options, grid, batch):
    torch.manual_seed(0)
    pooling = POOLINGS[name](DIM, **options).double().eval()
    tokens = given(batch, grid)
    out = pooling(tokens)
    count = grid[0] * grid[1]
    assert isinstance(out, Pooled) and out.vector.shape == (batch, DIM) and out.attention.shape[0::2] == (batch, count)
    assert out.attention.ge(0).all()
    total = out.attention.sum(-1)
    assert total.lt(1).all() if name == "cls" else torch.allclose(total, torch.ones_like(total))
    assert torch.equal(pooling(tokens).vector, out.vector)
    for i in range(batch):
        torch.testing.assert_close(pooling(one(tokens, i)).vector[0], out.vector[i], atol=1e-12, rtol=0)
    torch.manual_seed(1)
    twin = POOLINGS[name](DIM, **options).double()
    twin.load_state_dict(pooling.state_dict())
    assert torch.equal(twin(tokens).vector, out.vector)


@pytest.mark.parametrize("name, options", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_precision_and_gradients(name, options, dtype, zero):
    torch.manual_seed(0)
    exact = POOLINGS[name](DIM, **options).double()
    pooling = POOLINGS[name](DIM, **options)
    pooling.load_state_dict(exact.state_dict())
    tokens = given(5, (5, 7), dtype, zero)
    out = pooling.to(dtype)(tokens)
    assert out.vector.dtype == dtype
    out.vector.sum().backward()
    for leaf in (tokens.patches, tokens.prefix, *pooling.parameters()):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    loose = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(out.vector.double(), exact(given(5, (5, 7), zero=zero)).vector, atol=loose, rtol=loose)


def test_class_token_pooling_takes_no_bare_patches():
    for bare in (torch.zeros(2, 4, 8), Tokens(torch.zeros(2, 4, 8), torch.zeros(2, 0, 8), (2, 2))):
        with pytest.raises(UserError, match="simpool"):
            CLS(8)(bare)

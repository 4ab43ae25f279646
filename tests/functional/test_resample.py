import numpy as np
import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import resample


def table():
    a, b = torch.arange(14.0)[:, None], torch.arange(14.0)
    return torch.sin(0.3 * a + 0.5 * b).reshape(1, 196, 1)


GOLDEN = {  # of the position tables of DINO
    ("offset", 6): {(0, 0): 0.433330, (1, 1): 0.721462, (2, 3): -0.817902, (5, 5): -0.304783},
    ("size", 6): {(0, 0): 0.448185, (1, 1): 0.675463, (2, 3): -0.766352, (5, 5): -0.484048},
    ("offset", 30): {(0, 0): -0.084082, (1, 1): 0.118816, (2, 3): 0.686228, (29, 29): -0.884644},
    ("size", 30): {(0, 0): -0.084016, (1, 1): 0.120271, (2, 3): 0.689558, (29, 29): -0.888530},
}


@pytest.mark.parametrize("mode, size", GOLDEN)
def test_golden_values(mode, size):
    """Six printed digits, float32."""
    resampled = resample.position_table(table(), (14, 14), (size, size), mode).view(size, size)
    for place, value in GOLDEN[mode, size].items():
        assert resampled[place].item() == pytest.approx(value, abs=1.5e-6)  # six decimals of float32


def cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def line_weights(old, new, step):
    """Bicubic weights of one axis [new, old], in double precision, edges repeated."""
    weights = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * step - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(place - j)
    return weights


@pytest.mark.parametrize("mode", ["offset", "size", "offset_always"])
@pytest.mark.parametrize("old, new", [((14, 14), (6, 6)), ((14, 14), (5, 9)), ((4, 7), (14, 7)), ((14, 14), (7, 28))])
def test_against_an_own_bicubic(mode, old, new):
    values = torch.randn(1, old[0] * old[1], 3, dtype=torch.float64)
    extra = 0.0 if mode == "size" else 0.1
    rows, columns = (line_weights(o, n, o / (n + extra)) for o, n in zip(old, new))
    expected = np.einsum("ip,jq,pqd->ijd", rows, columns, values.view(*old, 3).numpy()).reshape(1, -1, 3)
    assert np.allclose(resample.position_table(values, old, new, mode).numpy(), expected, atol=1e-12)


def test_the_native_grid_is_untouched_unless_asked_for():
    for mode in ("offset", "size"):
        assert torch.equal(resample.position_table(table(), (14, 14), (14, 14), mode), table())
    assert (resample.position_table(table(), (14, 14), (14, 14), "offset_always") - table()).abs().max() > 1e-3


@pytest.mark.parametrize("side", range(1, 65))
def test_the_offset_never_loses_a_row(side):
    for old in (1, 7, 14, 16, 24, 37):
        assert resample.position_table(torch.zeros(1, old * old, 1), (old, old), (side, side + 1)).shape[1] == side * (
            side + 1
        )


def test_gradient_reaches_the_table():
    values = torch.randn(1, 16, 2, requires_grad=True)
    resample.position_table(values, (4, 4), (3, 3)).sum().backward()
    assert values.grad.abs().sum() > 0


def test_unknown_mode():
    with pytest.raises(UserError, match="offset, size or offset_always"):
        resample.position_table(table(), (14, 14), (6, 6), "linear")


@pytest.mark.parametrize("mode", ["offset", "size", "offset_always"])
def test_a_traced_grid_gets_the_same_table(mode):
    """The matrices of a program of unknown size equal torch's interpolation, on larger, smaller and equal grids."""
    from maskwise.functional import resample

    table = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for grid in ((3, 4), (7, 9), (2, 2), (3, 11), (5, 4), (1, 1)):
        wanted = resample.position_table(table, (3, 4), grid, mode)
        assert (resample._traced_table(table, (3, 4), grid, mode) - wanted).abs().max() < 1e-9, grid


def test_how_far_the_released_simpool_tables_are_bent():
    """At its own size, 9.0 % of a random table changes, 8.4 % of smooth waves, and nothing in mode size."""
    noise = torch.randn(1, 196, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bent = resample.position_table(noise, (14, 14), (14, 14), "offset_always")
    assert ((bent - noise).norm() / noise.norm()).item() == pytest.approx(0.09, abs=0.005)
    assert torch.equal(resample.position_table(noise, (14, 14), (14, 14), "size"), noise)

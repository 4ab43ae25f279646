"""Power means and log-mean-exp against their closed forms."""

import math

import pytest
import torch

from maskwise.functional.power_means import log_mean_exp, power_mean

V = torch.rand(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
A = torch.rand(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)


def mean_of(alpha, values=V):
    return power_mean(A, values, (1 - alpha) / 2)


def test_alpha_names_the_classical_means():
    rms, mean = (A @ V**2).sqrt(), A @ V
    geometric, harmonic = (
        torch.stack([(V[:, None] ** A[..., None])[:, i].prod(1) for i in range(3)], 1),
        1 / (A @ (1 / V)),
    )
    for alpha, wanted in ((-3, rms), (-1, mean), (1, geometric), (3, harmonic)):
        torch.testing.assert_close(mean_of(alpha), wanted, atol=1e-8, rtol=0)
    top, low = V.amax(1, keepdim=True).expand(-1, 3, -1), V.amin(1, keepdim=True).expand(-1, 3, -1)
    assert torch.equal(mean_of(-math.inf), top) and torch.equal(mean_of(math.inf), low)
    torch.testing.assert_close(mean_of(-5000.0), top, rtol=2e-3, atol=0)
    torch.testing.assert_close(mean_of(5000.0), low, rtol=2e-3, atol=0)


def test_monotone_in_gamma():
    means = [power_mean(A, V, gamma) for gamma in (-math.inf, -4, -1, -1e-3, 0, 1e-3, 0.5, 1, 2, 7, math.inf)]
    for lower, higher in zip(means, means[1:]):
        assert (higher - lower >= -1e-9).all()


def test_outside_its_domain():
    negative = V.clone()
    negative[0, 0, 0] = -0.5
    for alpha in (0.0, 1.0):
        assert mean_of(alpha, negative)[0, :, 0].isnan().all()
    zero = V.clone()
    zero[0, 0, 0] = 0.0
    assert mean_of(1.0, zero)[0, :, 0].abs().max() == 0 and mean_of(3.0, zero)[0, :, 0].abs().max() < 1e-300


@pytest.mark.parametrize("gamma", [0.5, 1.25, 2.0, 5.0])
def test_gradients_equal_those_of_the_plain_formula(gamma):
    values, weights, exponent = (
        V.clone().requires_grad_(),
        A.clone().requires_grad_(),
        torch.tensor(gamma, dtype=torch.float64, requires_grad=True),
    )
    ours = torch.autograd.grad(power_mean(weights, values, exponent).sin().sum(), [weights, values, exponent])
    plain = torch.autograd.grad((weights @ values**exponent).pow(1 / exponent).sin().sum(), [weights, values, exponent])
    for got, wanted in zip(ours, plain):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    fixed = torch.autograd.grad(power_mean(weights, values, gamma).sin().sum(), [weights, values])
    for got, wanted in zip(fixed, plain):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def test_large_powers_stay_in_range():
    wide = (V * 1e3).float().requires_grad_()
    out = power_mean(A.float(), wide, 60.0)
    out.sum().backward()
    assert out.isfinite().all() and wide.grad.isfinite().all() and (wide**60.0).isinf().any()


def test_log_mean_exp_between_mean_and_maximum():
    even = torch.full((2, 1, 9), 1 / 9, dtype=torch.float64)
    for r in (0.1, 1.0, 10.0, 300.0):
        u = log_mean_exp(even, V, r)
        assert (u >= V.mean(1, keepdim=True) - 1e-12).all() and (u <= V.amax(1, keepdim=True)).all()
        assert (V.amax(1, keepdim=True) - u).max() <= math.log(9) / r + 1e-12
    torch.testing.assert_close(log_mean_exp(A, V, 2.0), torch.log(A @ torch.exp(2 * V)) / 2)
    torch.testing.assert_close(log_mean_exp(A, V, 1e-6), A @ V, atol=1e-6, rtol=0)

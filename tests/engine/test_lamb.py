"""LAMB against timm, SGD against torch, and skipped steps."""

import pytest
import torch
from timm.optim.lamb import Lamb

from maskwise.engine.lamb import LAMB
from maskwise.engine.optim import SGD


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
        for shape in ((4, 3), (5,), (2, 2))
    ]


def groups(tensors):
    return [{"params": [tensors[0], tensors[2]], "weight_decay": 0.02}, {"params": [tensors[1]], "weight_decay": 0.0}]


def drive(optimizer, tensors, steps=6):
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return [tensor.detach() for tensor in tensors]


@pytest.mark.parametrize(
    "options",
    [{}, {"betas": (0.8, 0.99), "eps": 1e-8}, {"max_grad_norm": None, "trust_clip": True, "always_adapt": True}],
)
def test_lamb_equals_timm(options):
    mine, theirs = parameters(), parameters()
    actual = drive(LAMB(groups(mine), lr=1e-2, **options), mine)
    expected = drive(Lamb(groups(theirs), lr=1e-2, **options), theirs)
    for tensor, reference in zip(actual, expected):
        torch.testing.assert_close(tensor, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [LAMB, SGD])
def test_skipped_step_changes_no_parameter_and_no_state(kind):
    mine, theirs = parameters(), parameters()
    optimizer, reference = kind(groups(mine), lr=1e-2), kind(groups(theirs), lr=1e-2)
    drive(optimizer, mine, 2)
    optimizer.found_inf = torch.ones(())
    for tensor in mine:
        tensor.grad = torch.full_like(tensor, float("nan"))
    optimizer.step()
    optimizer.found_inf = torch.zeros(())
    actual = drive(optimizer, mine, 3)
    drive(reference, theirs, 2)
    for tensor, expected in zip(actual, drive(reference, theirs, 3)):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_nesterov_equals_torch():
    mine, theirs = parameters(), parameters()
    actual = drive(SGD(mine, lr=0.1, weight_decay=2e-5, momentum=0.9, nesterov=True), mine)
    expected = drive(torch.optim.SGD(theirs, lr=0.1, weight_decay=2e-5, momentum=0.9, nesterov=True), theirs)
    for tensor, reference in zip(actual, expected):
        torch.testing.assert_close(tensor, reference, rtol=1e-12, atol=1e-12)

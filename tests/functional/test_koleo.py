"""KoLeo: against a loop in float64 with numerical gradients, in parts, on equal rows, in bfloat16."""

import itertools
import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import koleo

VIEWS, ROWS, WIDTH = 2, 7, 5


def features(seed=0, rows=ROWS):
    return torch.randn(VIEWS, rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(rows):
    """The formula, image by image, in Python floats."""
    total = 0.0
    for view in rows.tolist():
        unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in view]
        for i, row in enumerate(unit):
            nearest = min(math.dist(row, other) for j, other in enumerate(unit) if j != i)
            total -= math.log(nearest + 1e-8) / len(unit) / len(rows)
    return total


def numerical_gradient(rows, step=1e-6):
    gradient = torch.zeros_like(rows)
    for place in itertools.product(*map(range, rows.shape)):
        sides = []
        for sign in (1, -1):
            moved = rows.clone()
            moved[place] += sign * step
            sides.append(looped(moved))
        gradient[place] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def gradient_of(loss, rows):
    return torch.autograd.grad(loss, rows)[0]


def test_value_and_gradient_are_those_of_the_loop():
    rows = features().requires_grad_()
    loss = koleo.koleo_loss(rows)
    assert loss.item() == pytest.approx(looped(rows), rel=1e-12)
    torch.testing.assert_close(gradient_of(loss, rows), numerical_gradient(rows.detach()), rtol=1e-5, atol=1e-7)


def test_known_distances():
    """On a circle at 0, 60 and 180 degrees the nearest are 1, 1 and sqrt(3) away."""
    rows = torch.tensor([[[2.0, 0.0], [0.5, math.sqrt(0.75)], [-3.0, 0.0]]], dtype=torch.float64)
    assert koleo.koleo_loss(rows).item() == pytest.approx(-math.log(3) / 6, abs=1e-7)


def test_similarities_in_chunks_are_the_whole(monkeypatch):
    unit = torch.nn.functional.normalize(features(rows=11), dim=-1)
    whole = koleo.nearest_others(unit)
    for entries in (1, 3 * 2 * 11):
        monkeypatch.setattr(koleo, "CHUNK_ENTRIES", entries)
        assert torch.equal(koleo.nearest_others(unit), whole)


def test_the_parts_of_a_batch_have_its_value_and_together_its_gradient():
    rows = features(rows=6).requires_grad_()
    loss = koleo.koleo_loss(rows)
    own, values = [], []
    for start in (0, 2, 4):
        part = rows.detach()[:, start : start + 2].clone().requires_grad_()
        value = koleo.koleo_loss_of_part(part, rows.detach(), start)
        values.append(value.item())
        own.append(gradient_of(value, part) / 3)
    assert values == pytest.approx([loss.item()] * 3, rel=1e-14)
    torch.testing.assert_close(torch.cat(own, dim=1), gradient_of(loss, rows), rtol=1e-12, atol=1e-15)


def test_equal_rows_push_no_one_and_the_others_as_before():
    rows = features()
    rows[0, 1] = 3 * rows[0, 0]  # the same direction
    rows.requires_grad_()
    loss = koleo.koleo_loss(rows)
    gradient = gradient_of(loss, rows)
    assert loss.item() == pytest.approx(looped(rows), rel=1e-6) and gradient.isfinite().all()
    assert gradient.abs().max() < 10, "a direction divided by a distance of 0 would be of the order of 1e8"
    torch.testing.assert_close(gradient[1], numerical_gradient(rows.detach())[1], rtol=1e-5, atol=1e-7)
    same = torch.ones(1, 4, 3, requires_grad=True)
    collapsed = koleo.koleo_loss(same)
    assert collapsed.item() == pytest.approx(-math.log(1e-8), rel=1e-6) and not gradient_of(collapsed, same).any()


def test_distances_are_float32_under_autocast_and_for_bfloat16():
    rows = features().float()
    expected = koleo.koleo_loss(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo.koleo_loss(rows), expected)
    half = koleo.koleo_loss(rows.bfloat16())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), rel=0.05)


def test_a_batch_of_one_is_refused():
    with pytest.raises(UserError, match="this batch has one") as caught:
        koleo.koleo_loss(features(rows=1))
    assert "\n" not in str(caught.value)

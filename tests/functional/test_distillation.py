"""Distillation's functions of tensors against loops and closed forms."""

import math

import pytest
import torch

from maskwise.functional import distillation


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosine_distance_is_that_of_the_loop_and_leaves_the_teacher_alone():
    student, teacher = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5, seed=1).requires_grad_()
    found = distillation.cosine_distance(student, teacher)
    for a in range(2):
        for b in range(3):
            s, t = student[a, b].tolist(), teacher[a, b].tolist()
            cosine = sum(x * y for x, y in zip(s, t)) / math.hypot(*s) / math.hypot(*t)
            assert found[a, b].item() == pytest.approx(1 - cosine, rel=1e-12)
    found.sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert distillation.cosine_distance(student.float(), teacher.bfloat16()).dtype == torch.float32


def test_half_as_many_cells_average_two_by_two_and_more_interpolate():
    tokens = randn(2, 4 * 6, 3)
    plane = tokens.view(2, 4, 6, 3)
    expected = (plane[:, ::2, ::2] + plane[:, 1::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, 1::2]) / 4
    found = distillation.resample_tokens(tokens, (4, 6), (2, 3))
    torch.testing.assert_close(found, expected.flatten(1, 2), rtol=1e-12, atol=1e-14)
    assert distillation.resample_tokens(tokens, (4, 6), (4, 6)) is tokens
    pair = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)  # centers at 1/4 and 3/4 of the width
    wide = distillation.resample_tokens(pair, (1, 2), (1, 4)).flatten()
    assert wide.tolist() == pytest.approx([0, 0.25, 0.75, 1], abs=1e-12)


def test_masked_mean_counts_unmasked_views_as_zero():
    values, mask = randn(3, 4), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    expected = ((values[0, 0] + values[0, 2]) / 2 + values[2].mean()) / 3
    assert distillation.masked_mean(values, mask).item() == pytest.approx(expected.item(), rel=1e-12)


def test_renormalized_images_are_the_pixels_in_the_other_statistics():
    pixels = randn(2, 3, 4, 4)
    old, new = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), ((0.5, 0.4, 0.6), (0.2, 0.3, 0.25))
    views = [
        (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1) for mean, std in (old, new)
    ]
    torch.testing.assert_close(distillation.renormalize(views[0], old, new), views[1], rtol=1e-6, atol=1e-6)
    assert distillation.renormalize(views[0], old, old) is views[0]

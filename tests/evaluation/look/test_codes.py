"""Tokens in bytes: cosines against float64, colors against a PCA by singular values."""

import numpy as np
import torch
import torch.nn.functional as F

from maskwise.evaluation.look.codes import colors, encode


def tokens(count=90, width=24, seed=0):
    """Unit vectors in a few strong directions and noise, like those of a network."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.randn(count, 4, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    basis = torch.linalg.qr(torch.randn(width, 4, generator=torch.Generator().manual_seed(9))).Q
    return F.normalize(strong @ basis.T + 0.1 * torch.randn(count, width, generator=generator), dim=1)


def test_cosines_are_near_those_of_float64_and_the_stated_error_bounds_them():
    x = tokens()
    exact = (x.double() @ x.double().T).numpy()
    errors = {}
    for most in (3, 24):
        codes = encode(x, most)
        assert codes.values.shape == (90, most) and codes.values.dtype == torch.int8
        errors[most] = max(np.abs(codes.cosines(i).numpy() - exact[i]).max() for i in range(90))
        assert codes.error <= errors[most] + 1e-9 and errors[most] <= 1.5 * codes.error
    assert errors[24] < 0.015 < errors[3]


def test_few_directions_are_those_of_largest_second_moment():
    x = tokens().double()
    _, _, rows = np.linalg.svd(x.numpy(), full_matrices=False)
    codes = encode(x.float(), 4)
    assert np.allclose(np.abs(codes.basis.double().numpy() @ rows[:4].T), np.eye(4), atol=1e-4)


def test_colors_are_joint_principal_components():
    parts = [tokens(seed=1), tokens(50, seed=2)]
    x = torch.cat(parts).double().numpy()
    centered = x - x.mean(axis=0)
    _, _, rows = np.linalg.svd(centered, full_matrices=False)
    axes = rows[:3].T
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])
    projected = centered @ axes
    low, high = np.percentile(projected, [1, 99], axis=0)
    wanted = np.clip((projected - low) / (high - low) * 255, 0, 255)
    found = colors([encode(part, 24) for part in parts])
    assert [tuple(part.shape) for part in found] == [(90, 3), (50, 3)]
    error = np.abs(np.concatenate([part.numpy() for part in found]) - wanted)
    assert error.max() < 6 and error.mean() < 1.5
    assert wanted.std(axis=0).min() > 30, "no component is flat"


def test_one_patch_and_equal_patches_have_finite_colors():
    for x in (torch.ones(1, 5) / 5**0.5, torch.ones(7, 2) / 2**0.5):
        codes = encode(x, 8)
        assert codes.error < 0.01 and colors([codes])[0].shape == (len(x), 3)

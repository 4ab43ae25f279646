"""Whitening of patches against NumPy in float64: moments, filters, and the covariance of what they return."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maskwise.functional.whitening.patches import PatchMoments, whitening_filters


def images(count=6, side=12, channels=3):
    """Smooth images, whose neighboring pixels and channels are correlated."""
    noise = torch.randn(count, channels, side + 2, side + 2, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise + noise.mean(1, keepdim=True), 3, stride=1).double() + 0.3


def patches(x, kernel):
    """All patches inside, one per row, by a loop: entries (channel, row, column)."""
    b, _, h, w = x.shape
    return np.stack(
        [
            x[i, :, r : r + kernel, c : c + kernel].numpy().ravel()
            for i in range(b)
            for r in range(h - kernel + 1)
            for c in range(w - kernel + 1)
        ]
    )


@pytest.mark.parametrize("kernel", [2, 3])
def test_covariance_equals_numpys_for_any_split_into_batches(kernel):
    x, moments = images(), PatchMoments(3, kernel)
    for part in x.split([1, 3, 2]):
        moments.add(part)
    rows = patches(x, kernel)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.covariance(), np.cov(rows.T, bias=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel, channels", [(2, 3), (3, 3), (3, 1)])
def test_whitened_patches_have_the_identity_as_covariance(kernel, channels):
    x, moments = images(40, channels=channels), PatchMoments(channels, kernel)
    moments.add(x)
    filters = whitening_filters(moments.covariance(), eps=0.0)
    whitened = F.conv2d(x, filters.reshape(-1, channels, kernel, kernel))  # filters as a convolution holds them
    rows = whitened.movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(np.cov(rows, bias=True), np.eye(len(rows)), rtol=0, atol=1e-8)


def test_filters_are_numpys_eigenvectors_by_falling_eigenvalue():
    moments = PatchMoments(3, 2)
    moments.add(images())
    values, vectors = np.linalg.eigh(np.cov(patches(images(), 2).T, bias=True))
    for row, value, vector in zip(whitening_filters(moments.covariance(), eps=0.01), values[::-1], vectors.T[::-1]):
        expected = vector / np.sqrt(value + 0.01)
        expected *= np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-8)
        assert row[row.abs().argmax()] > 0


def test_constant_images_are_no_division_by_zero():
    moments = PatchMoments(3, 2)
    moments.add(torch.ones(2, 3, 8, 8))
    assert whitening_filters(moments.covariance()).isfinite().all()

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from maskwise.errors import UserError
from maskwise.functional.whitening import features as module
from maskwise.functional.whitening.features import pca_whitening


def rows(count, width, seed=0, offset=0.0):
    """Correlated rows of falling variances."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3.0, 0.3, width)
    mixing, _ = torch.linalg.qr(torch.randn(width, width, generator=g))
    return (torch.randn(count, width, generator=g) * scale) @ mixing + offset


@pytest.mark.parametrize("count, width", [(300, 12), (40, 60), (30, 30)])
def test_equals_scikit_learn(count, width, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 7)  # several chunks, the last one short
    data = rows(count, width, offset=5.0)
    kept = min(width, count - 1, 10)
    fitted = pca_whitening(data, dims=10)
    expected = PCA(kept, whiten=True, svd_solver="full").fit(data.double().numpy())
    np.testing.assert_allclose(fitted.mean.numpy(), expected.mean_, rtol=1e-10)
    unbiased = count / (count - 1)  # scikit-learn divides by n - 1
    np.testing.assert_allclose(fitted.variances.numpy() * unbiased, expected.explained_variance_, rtol=1e-9)
    theirs = expected.transform(data.double().numpy()) * unbiased**0.5
    signs = np.sign((theirs * fitted(data).numpy()).sum(axis=0))
    np.testing.assert_allclose(fitted(data).numpy(), theirs * signs, atol=2e-5)


@pytest.mark.parametrize("count, width", [(500, 20), (25, 80)])
def test_whitened_rows_have_the_identity_as_covariance(count, width):
    data = rows(count, width, seed=1)
    white = pca_whitening(data, dims=15)(data).double()
    assert white.mean(dim=0).abs().max() < 1e-5
    torch.testing.assert_close(white.T @ white / count, torch.eye(15, dtype=torch.float64), atol=1e-5, rtol=0)


def test_by_hand():
    # Rows (+-4, +-1) around (10, 20): variances 16 and 1 along the axes, so that every whitened entry is +-1.
    data = torch.tensor([[14.0, 21.0], [14.0, 19.0], [6.0, 21.0], [6.0, 19.0]])
    fitted = pca_whitening(data)
    assert fitted.mean.tolist() == [10.0, 20.0] and fitted.variances.tolist() == pytest.approx([16.0, 1.0])
    torch.testing.assert_close(fitted(data), torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
    torch.testing.assert_close(fitted(torch.tensor([[18.0, 20.0]])), torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize("count", [9, 200])
def test_directions_without_data_are_dropped(count):
    data = rows(count, 4)
    wide = torch.cat([data, data[:, :2] * 2, torch.full((count, 10), 7.0)], dim=1)  # rank 4 in 16 dimensions
    assert len(pca_whitening(wide, dims=256).variances) == 4
    assert len(pca_whitening(wide, dims=3).variances) == 3
    assert len(pca_whitening(wide, dims=256, floor=0.5).variances) < 4
    assert len(pca_whitening(rows(3, 8)).variances) == 2  # n - 1


def test_a_far_mean_loses_no_digits():
    near = pca_whitening(rows(400, 6))
    far = pca_whitening(rows(400, 6).double() + 1e6)
    torch.testing.assert_close(far.variances, near.variances, rtol=1e-6, atol=0)


def test_equal_images_are_refused():
    with pytest.raises(UserError, match="two different images"):
        pca_whitening(torch.ones(5, 3))
    with pytest.raises(UserError, match="two different images"):
        pca_whitening(torch.ones(1, 3))


def test_signs_do_not_depend_on_the_solver():
    for count in (50, 5):
        components = pca_whitening(rows(count, 10)).components
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        assert (largest > 0).all()

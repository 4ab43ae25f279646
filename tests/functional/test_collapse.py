"""Signs of health against slow second derivations."""

import pytest
import torch

from maskwise.functional.collapse import duplicate_fraction, mask_agreement, participation_ratio


@pytest.mark.parametrize("n, d", [(5, 12), (40, 6)])
def test_participation_ratio_is_that_of_the_covariances_eigenvalues(n, d):
    features = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0.1, 2, d
    )
    values = torch.linalg.eigvalsh(torch.cov(features.T))
    torch.testing.assert_close(participation_ratio(features), values.sum() ** 2 / values.square().sum())


def test_participation_ratio_of_known_clouds():
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    torch.testing.assert_close(participation_ratio(axes), torch.tensor(4.0))
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(participation_ratio(line), torch.tensor(1.0))
    assert participation_ratio(torch.ones(6, 3)) == 0


def test_twins_are_counted_by_pairs():
    unit = torch.nn.functional.normalize(
        torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    unit[3] = unit[1] = unit[0]
    assert duplicate_fraction(unit) == pytest.approx(3 / 15)  # three of fifteen pairs
    assert duplicate_fraction(unit[:1]) == 0 and duplicate_fraction(unit[:2]) == 1 and duplicate_fraction(unit[3:]) == 0


def kappa(mask):
    """Fleiss' kappa over pairs of masked views, as it is defined: agreement beyond chance."""
    rows = [row for row in mask.tolist() if any(row)]
    pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    observed = sum(x == y for a, b in pairs for x, y in zip(a, b)) / (len(pairs) * len(rows[0]))
    share = sum(map(sum, rows)) / (len(rows) * len(rows[0]))
    chance = share**2 + (1 - share) ** 2
    return (observed - chance) / (1 - chance)


@pytest.mark.parametrize("views", [2, 3, 9])
def test_mask_agreement_is_kappa_over_pairs(views):
    mask = torch.rand(views, 16, generator=torch.Generator().manual_seed(views)) < 0.4
    mask[0] = views == 2
    mask[0, :3] = False
    assert mask_agreement(mask) == pytest.approx(kappa(mask), abs=1e-6)


def test_mask_agreement_of_known_masks():
    one = torch.tensor([True, False, False, True, False, False])
    assert mask_agreement(one.expand(5, 6)) == 1
    assert mask_agreement(torch.stack([one, one, ~one.any().expand(6)])) == 1  # an unmasked view has no say
    half = torch.rand(400, 100, generator=torch.Generator().manual_seed(0)) < 0.3
    assert abs(mask_agreement(half)) < 0.01
    for nothing in (torch.zeros(4, 6, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool), one[None]):
        assert mask_agreement(nothing) == 0

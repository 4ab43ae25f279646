"""Statistics of the tables against scipy, closed forms and resampling one by one."""

import math

import numpy as np
import pytest
from scipy import stats

from launch.reproduce.tables import statistics
from launch.reproduce.tables.statistics import (
    holm,
    image_bootstrap,
    paired_p,
    pooled_deviation,
    seed_bootstrap,
    seeds_needed,
    smallest_effect,
    t_interval,
)

A = [61.2, 60.1, 62.7, 59.8, 61.5]
B = [60.4, 60.3, 60.9, 58.8, 61.1]
DIFFERENCES = [a - b for a, b in zip(A, B)]


def scipy_bootstrap(differences, resamples=100_000):
    return stats.bootstrap(
        (np.array(differences),), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval


@pytest.mark.parametrize("differences", [DIFFERENCES[:3], DIFFERENCES, DIFFERENCES + [0.3, -0.2, 1.1]])
def test_bootstrap_over_seeds_equals_that_of_scipy(differences):
    low, high = seed_bootstrap(differences)
    expected = scipy_bootstrap(differences)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_of_two_seeds_is_known_by_hand():
    # the means of the four resamples are 1, 2, 2, 3: the outer two have a probability of a quarter each
    assert seed_bootstrap([1.0, 3.0]) == (1.0, 3.0) and seed_bootstrap([1.0, 3.0], level=0.4) == (2.0, 2.0)
    assert seed_bootstrap([1.0]) == (1.0, 1.0)


def test_t_interval_and_p_value_equal_those_of_scipy():
    test = stats.ttest_rel(A, B)
    assert t_interval(DIFFERENCES) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert paired_p(DIFFERENCES) == pytest.approx(test.pvalue)
    assert t_interval([1.0]) == (-math.inf, math.inf) and math.isnan(paired_p([1.0]))
    assert paired_p([0.0, 0.0]) == 1.0 and paired_p([0.5, 0.5]) == 0.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.04) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)


def rows(seeds, images, generator):
    a = generator.random((seeds, images)) < 0.6
    flips = generator.random((seeds, images)) < 0.2
    return a, a ^ flips


@pytest.mark.parametrize("same_images", [True, False])
def test_bootstrap_over_images_equals_resampling_one_by_one(same_images):
    generator = np.random.default_rng(3)
    a, b = rows(3, 200, generator)
    difference = a.astype(float) - b
    means = []
    for _ in range(4000):
        if same_images:
            picked = generator.integers(200, size=200)
            means.append(100 * np.mean([row[picked].mean() for row in difference]))
        else:
            means.append(100 * np.mean([row[generator.integers(200, size=200)].mean() for row in difference]))
    low, high = image_bootstrap(a, b, same_images=same_images)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.25)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.25)


def test_bootstrap_over_images_equals_the_normal_interval_of_many():
    a, b = rows(1, 20_000, np.random.default_rng(4))
    difference = 100 * (a[0].astype(float) - b[0])
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    low, high = image_bootstrap(a, b, same_images=False)
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.03)
    assert (high - low) / 2 == pytest.approx(half, rel=0.04)


def test_shared_images_give_a_wider_interval_where_seeds_err_alike():
    generator = np.random.default_rng(5)
    one = rows(1, 500, generator)
    a, b = (np.repeat(part, 4, axis=0) for part in one)  # four seeds that err on the same images
    together, apart = (image_bootstrap(a, b, same_images=same) for same in (True, False))
    assert (together[1] - together[0]) == pytest.approx(2 * (apart[1] - apart[0]), rel=0.1)


def power_of(n, deviation, effect, alpha=0.05):
    """Exact power of the paired two-sided t-test, by the noncentral t distribution."""
    shift, limit = effect / deviation * math.sqrt(n), stats.t.ppf(1 - alpha / 2, n - 1)
    return stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)


@pytest.mark.parametrize("deviation", [0.3, 0.6, 1.0, 2.5])
def test_seeds_needed_against_the_exact_power(deviation):
    n = seeds_needed(deviation, 0.5)
    exact = next(n for n in range(2, 2000) if power_of(n, deviation, 0.5) >= 0.8)
    assert n <= exact <= n + 3
    assert smallest_effect(deviation, n) <= 0.5 < smallest_effect(deviation, n - 1) or n == 2


def test_seeds_needed_by_hand():
    # (1.959964 + 0.841621)^2 = 7.848879; a deviation of the effect's size needs 8, twice the deviation 32
    assert seeds_needed(0.5) == 8 and seeds_needed(1.0) == 32 and seeds_needed(0.0) == 2
    assert statistics.EFFECT == 0.5


def test_pooled_deviation_is_the_root_of_the_mean_variance():
    # deviations of pairs are |x - y| / sqrt(2): variances 2 and 8
    assert pooled_deviation([[1.0, 3.0], [0.0, 4.0]]) == pytest.approx(math.sqrt(5.0))
    assert math.isnan(pooled_deviation([[1.0]]))

"""Statistics over seeds and test images: spread, paired intervals, number of seeds that a difference needs.

Rows are paired: with one seed all rows see the same images, crops and initial weights of the shared parts. Two kinds of
intervals answer two questions. Over seeds: would other seeds show the difference? With three to five seeds the
bootstrap is too narrow (it resamples few numbers), so the interval of Student's t stands beside it, and decides. Over
images, within the seeds that were run: would other test images show it? That one says nothing of other seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np

LEVEL = 0.95
ALPHA, POWER = 0.05, 0.8
EFFECT = 0.5  # points: the smallest difference that counts
EXACT = 50_000  # resamples that are enumerated rather than drawn
RESAMPLES = 10_000


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds, nan of a single one."""
    return stdev(values) if len(values) > 1 else math.nan


def seed_bootstrap(differences: Sequence[float], level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of paired differences, one per seed.

    All n^n resamples are enumerated where they are few (n up to 6), otherwise RESAMPLES are drawn.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n**n <= EXACT:
        means = np.array([fmean(values[list(rows)]) for rows in itertools.product(range(n), repeat=n)])
    else:
        means = values[np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))].mean(axis=1)
    return bounds(means, level)


def t_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return Student's interval of the mean of paired differences; infinite for a single seed."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, n - 1) * stdev(differences) / math.sqrt(n)
    return fmean(differences) - half, fmean(differences) + half


def paired_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test, nan of a single seed."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return math.nan
    error = stdev(differences) / math.sqrt(n)
    if error == 0:
        return 1.0 if fmean(differences) == 0 else 0.0
    return float(2 * stats.t.sf(abs(fmean(differences)) / error, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values of a family of tests, in its order; nan stays and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def image_bootstrap(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], *, same_images: bool, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval, in points, of the difference of two rows' accuracies over test images.

    a, b: for each seed whether each test image was right, bool [images]. same_images: all seeds have the same test
    images, which are then resampled for all seeds together; else each seed's are resampled on their own. Counts of
    resampled values are drawn from a multinomial distribution, which equals resampling the images one by one.
    """
    generator = np.random.default_rng(seed)
    differences = [one.astype(float) - other.astype(float) for one, other in zip(a, b, strict=True)]
    groups = [np.mean(differences, axis=0)] if same_images else differences
    means = np.zeros(RESAMPLES)
    for values in groups:
        levels, counts = np.unique(values, return_counts=True)
        draws = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
        means += draws @ levels / len(values) / len(groups)
    return bounds(100 * means, level)


def bounds(means: np.ndarray, level: float) -> tuple[float, float]:
    """Return the percentile interval of resampled means; of few distinct ones the outer, not an interpolated one."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


def pooled_deviation(differences: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation of paired differences, pooled over contrasts: root of the mean variance.

    Two seeds give each contrast one degree of freedom, too few to say anything alone.
    """
    variances = [stdev(values) ** 2 for values in differences if len(values) > 1]
    return math.sqrt(fmean(variances)) if variances else math.nan


def seeds_needed(deviation: float, effect: float = EFFECT, alpha: float = ALPHA, power: float = POWER) -> int:
    """Return the number of seeds for a paired two-sided test to see `effect`, by the normal approximation, at least 2.

    n = ((z(1 - alpha / 2) + z(power)) deviation / effect)^2. It is one to three seeds below the exact number, where
    that is small.
    """
    quantile = NormalDist().inv_cdf
    return max(2, math.ceil(((quantile(1 - alpha / 2) + quantile(power)) * deviation / effect) ** 2 - 1e-9))


def smallest_effect(deviation: float, seeds: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the difference that this number of seeds can see, by the same approximation."""
    quantile = NormalDist().inv_cdf
    return (quantile(1 - alpha / 2) + quantile(power)) * deviation / math.sqrt(seeds)

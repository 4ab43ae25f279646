"""Metrics of scikit-learn and SciPy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskwise.errors import UserError


def cluster_scores(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """Score clusters against classes, int64 [n] each -> {"nmi", "ari", "fmi", "matched_accuracy"}, in per cent.

    nmi: mutual information over the arithmetic mean of both entropies; ari: adjusted Rand index; fmi: Fowlkes-Mallows,
    NaN where no two images share a class, or none a cluster;
    matched_accuracy: share of images right under the best one-to-one assignment of clusters to classes (Hungarian);
    unassigned clusters count as wrong. Raises UserError without scikit-learn or SciPy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
        from sklearn import metrics
    except ImportError:
        raise UserError("clustering scores need scikit-learn and SciPy: pip install 'maskwise[eval]'") from None
    truth, assigned = labels.cpu().numpy(), clusters.cpu().numpy()
    table = confusion(clusters, labels).numpy()
    has_pairs = table.sum(axis=0).max() > 1 and table.sum(axis=1).max() > 1
    rows, columns = linear_sum_assignment(table, maximize=True)
    scores = {
        "nmi": metrics.normalized_mutual_info_score(truth, assigned),
        "ari": metrics.adjusted_rand_score(truth, assigned),
        "fmi": metrics.fowlkes_mallows_score(truth, assigned) if has_pairs else math.nan,
        "matched_accuracy": table[rows, columns].sum() / max(1, len(truth)),
    }
    return {name: 100.0 * float(value) for name, value in scores.items()}


def confusion(predicted: Tensor, truth: Tensor, classes: int | None = None) -> Tensor:
    """Count predictions (columns) of each true class (rows): int64 [n] each -> int64 [C, C'].

    With `classes` the table is [classes, classes].
    """
    rows, columns = classes or 1, classes or 1
    if not classes and len(truth):
        rows, columns = int(truth.max()) + 1, int(predicted.max()) + 1
    cells = truth.cpu().long() * columns + predicted.cpu().long()
    return torch.bincount(cells, minlength=rows * columns).reshape(rows, columns)

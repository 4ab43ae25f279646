"""Measures that scikit-learn and SciPy have right, behind one line for whoever lacks them (evaluation.md 16)."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwise.functional.errors import UserError


def cluster_scores(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """Agreement of clusters with classes, int64 [n] each -> {"nmi", "ari", "fmi", "matched_accuracy"}, in per cent.

    nmi: mutual information over the arithmetic mean of both entropies; ari: adjusted Rand index; fmi: Fowlkes-Mallows;
    matched_accuracy: share of images right under the best one-to-one assignment of clusters to classes (Hungarian), clusters
    that are left over being wrong. attmask.md 5.8. Raises UserError where scikit-learn or SciPy is absent.
    """
    try:
        from scipy.optimize import linear_sum_assignment
        from sklearn import metrics
    except ImportError:
        raise UserError("clustering scores need scikit-learn and SciPy: pip install 'maskwise[eval]'") from None
    truth, found = labels.cpu().numpy(), clusters.cpu().numpy()
    table = confusion(clusters, labels).numpy()
    rows, columns = linear_sum_assignment(table, maximize=True)
    scores = {
        "nmi": metrics.normalized_mutual_info_score(truth, found),
        "ari": metrics.adjusted_rand_score(truth, found),
        "fmi": metrics.fowlkes_mallows_score(truth, found),
        "matched_accuracy": table[rows, columns].sum() / max(1, len(truth)),
    }
    return {name: 100.0 * float(value) for name, value in scores.items()}


def confusion(predicted: Tensor, truth: Tensor, classes: int | None = None) -> Tensor:
    """How often each truth (row) was predicted as what (column): int64 [n] each -> int64 [C, C'], square if `classes` is given."""
    rows, columns = (classes, classes) if classes else (int(truth.max()) + 1, int(predicted.max()) + 1) if len(truth) else (1, 1)
    cells = truth.cpu().long() * columns + predicted.cpu().long()
    return torch.bincount(cells, minlength=rows * columns).reshape(rows, columns)

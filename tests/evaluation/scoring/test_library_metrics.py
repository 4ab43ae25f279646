import itertools
import math

import pytest
import torch

from maskwise.evaluation.scoring.library_metrics import cluster_scores, confusion

pytest.importorskip("sklearn")


def by_counting(clusters, labels):
    """NMI from entropies, ARI and Fowlkes-Mallows from all pairs, matched accuracy from all permutations."""
    n, pairs = len(labels), list(itertools.combinations(range(len(labels)), 2))
    entropy = lambda values: -sum(values.count(v) / n * math.log(values.count(v) / n) for v in set(values))
    both = list(zip(clusters, labels))
    mutual = entropy(clusters) + entropy(labels) - entropy(both)
    nmi = mutual / ((entropy(clusters) + entropy(labels)) / 2)
    a = sum(clusters[i] == clusters[j] and labels[i] == labels[j] for i, j in pairs)
    b, c = sum(clusters[i] == clusters[j] for i, j in pairs), sum(labels[i] == labels[j] for i, j in pairs)
    expected = b * c / len(pairs)
    ari = (a - expected) / ((b + c) / 2 - expected)
    count = max(max(clusters), max(labels)) + 1
    matched = max(sum(one[k] == label for k, label in both) for one in itertools.permutations(range(count))) / n
    return {"nmi": nmi, "ari": ari, "fmi": a / math.sqrt(b * c), "matched_accuracy": matched}


@pytest.mark.parametrize("clusters", [3, 5])
def test_cluster_scores_against_counting(clusters):
    g = torch.Generator().manual_seed(clusters)
    assigned, labels = torch.randint(clusters, (24,), generator=g), torch.randint(4, (24,), generator=g)
    expected = by_counting(assigned.tolist(), labels.tolist())
    assert cluster_scores(assigned, labels) == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_cluster_scores_ignore_cluster_numbers():
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert list(cluster_scores((labels + 1) % 3, labels).values()) == pytest.approx([100.0] * 4)


def test_confusion_counts_truth_by_row():
    assert confusion(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 2).tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("clusters, labels", [([0], [0]), ([0, 1, 2], [2, 0, 1]), ([0, 0], [0, 1]), ([0, 1], [0, 0])])
def test_fowlkes_mallows_is_undefined_without_pairs(clusters, labels):
    assert math.isnan(cluster_scores(torch.tensor(clusters), torch.tensor(labels))["fmi"])
    assert cluster_scores(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]))["fmi"] == pytest.approx(100.0)

"""Clusters of planted vectors: every other protocol gives another number."""

import itertools

import pytest
import torch

from maskwise.evaluation.clustering import clustering, kmeans
from support.planted import Lookup, Pictures, gray


def pictures(labels):
    return {"test": Pictures([gray(i) for i in range(len(labels))], labels)}


def test_vectors_are_normalized_before_clustering():
    """Two directions are the classes; the lengths, 1 and 50, would be the clusters of the vectors themselves."""
    pytest.importorskip("sklearn")
    rows = [[length, 0.3 * length * side] for side in (-1, 1) for length in (1, 1, 1, 50, 50, 50)]
    numbers = clustering(Lookup(rows), pictures([0] * 6 + [1] * 6)).numbers
    assert numbers["matched_accuracy"] == numbers["nmi"] == numbers["ari"] == pytest.approx(100)


def test_images_go_to_the_largest_logit_of_the_head():
    pytest.importorskip("sklearn")
    head = torch.nn.Linear(3, 3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3)), head.bias.zero_()
    rows = [[1, 0, 0], [0.9, 0.1, 0.2], [0.1, 0.8, 0], [0, 1, 0.3], [0.5, 0.4, 0.6], [0, 0, 1]]
    numbers = clustering(Lookup(rows), pictures([0, 0, 1, 1, 2, 2]), head=head).numbers
    assert numbers["matched_accuracy"] == numbers["ari"] == pytest.approx(100) and numbers["clusters_used"] == 3


def test_the_best_of_the_restarts_is_kept():
    """Against all partitions of eight numbers into three groups; most single starts end in a worse one."""
    rows = torch.tensor([0.0, 1.0, 5.0, 6.5, 10.0, 10.5, 20.0, 21.0])
    best = min(
        sum(float((rows[chosen] - rows[chosen].mean()).square().sum()) for chosen in groups)
        for groups in (
            [torch.tensor(given) == k for k in range(3)] for given in itertools.product(range(3), repeat=len(rows))
        )
        if all(chosen.any() for chosen in groups)
    )
    single = [kmeans(rows[:, None], 3, restarts=1, seed=seed)[1] for seed in range(8)]
    assert max(single) > 1.2 * best, "the numbers have local optima"
    for seed in range(8):
        assert kmeans(rows[:, None], 3, restarts=10, seed=seed)[1] == pytest.approx(best)

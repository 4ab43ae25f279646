"""Targets and losses of classification against loops in float64, closed forms and timm."""

import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import classification


def logits(rows, classes, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_smoothing_closed_form():
    smoothed = classification.smooth_labels(torch.tensor([2, 0]), 5, 0.1)
    assert torch.allclose(smoothed, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02], [0.92, 0.02, 0.02, 0.02, 0.02]]))
    assert torch.equal(classification.smooth_labels(torch.tensor([1]), 3), torch.tensor([[0.0, 1.0, 0.0]]))


def test_losses_against_loops():
    z, targets = logits(4, 3), torch.softmax(logits(4, 3, 1), dim=1)
    soft = binary = hard = 0.0
    for row, aim in zip(z.tolist(), targets.tolist()):
        total = sum(math.exp(value) for value in row)
        for value, share in zip(row, aim):
            soft -= share * math.log(math.exp(value) / total) / 4
            p = 1 / (1 + math.exp(-value))
            binary -= (share * math.log(p) + (1 - share) * math.log(1 - p)) / 12
            hard -= (math.log(p) if share > 0.3 else math.log(1 - p)) / 12
    assert classification.softmax_loss(z, targets).item() == pytest.approx(soft, rel=1e-12)
    assert classification.binary_loss(z, targets).item() == pytest.approx(binary, rel=1e-12)
    assert classification.binary_loss(z, targets, 0.3).item() == pytest.approx(hard, rel=1e-12)


def test_jsd_against_a_loop_and_timm():
    from timm.loss import JsdCrossEntropy

    z, labels = logits(3 * 4, 5), torch.tensor([0, 3, 4, 1])
    expected = 0.0
    for image in range(4):
        views = [[math.exp(value) for value in z[split * 4 + image].tolist()] for split in range(3)]
        views = [[value / sum(row) for value in row] for row in views]
        mixed = [sum(column) / 3 for column in zip(*views)]
        expected += sum(p * math.log(p / m) for row in views for p, m in zip(row, mixed)) / (3 * 4)
    assert classification.jsd(z, 3).item() == pytest.approx(expected, rel=1e-12)
    both = classification.criterion(splits=3, jsd_weight=12.0)(z, classification.smooth_labels(labels, 5, 0.1).double())
    assert both.item() == pytest.approx(JsdCrossEntropy(3, 12, 0.1)(z, labels).item(), rel=1e-6)


def test_views_without_divergence_are_averaged():
    z, targets = logits(6, 4), classification.smooth_labels(torch.tensor([0, 1, 2]), 4).double()
    halves = [classification.softmax_loss(part, targets) for part in z.split(3)]
    assert classification.criterion(splits=2)(z, targets).item() == pytest.approx(sum(halves).item() / 2, rel=1e-12)


def test_hits_by_hand():
    z = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [1, 1, 0, 0]])
    assert classification.topk_correct(z, torch.tensor([0, 0, 1]), k=2).tolist() == [1, 2]  # the tie goes to class 0
    assert classification.topk_correct(z, torch.tensor([0, 0, 1])).tolist() == [1, 3]


def test_half_precision_is_widened_and_unknown_losses_are_refused():
    z = logits(2, 3).to(torch.bfloat16)
    assert classification.softmax_loss(z, classification.smooth_labels(torch.tensor([0, 1]), 3)).dtype == torch.float32
    with pytest.raises(UserError, match="method.loss='hinge' is unknown: choose one of softmax, bce"):
        classification.criterion("hinge")

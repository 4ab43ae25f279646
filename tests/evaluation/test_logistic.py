"""Logistic regression against scikit-learn, and the gradient at the optimum."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation.logistic import logistic, score, solve
from support.tiny_sets import sets, tiny_encoder


def some(n=120, width=8, classes=4):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=g)
    return torch.randn(n, width, generator=g, dtype=torch.float64) + torch.eye(classes, width, dtype=torch.float64)[
        labels
    ], labels


@pytest.mark.parametrize("penalty", [0.01, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_scikit_learn(penalty, normalize):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, labels = some()
    weight, _ = solve(
        rows, labels, 4, penalty, start=torch.zeros(4, 8, dtype=torch.float64), normalize=normalize, max_iterations=500
    )
    x = torch.nn.functional.normalize(rows, dim=1) if normalize else rows
    model = linear_model.LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=10000).fit(
        x.numpy(), labels.numpy()
    )
    assert torch.allclose(weight, torch.from_numpy(model.coef_), atol=2e-3 * weight.abs().max())
    assert score(weight, rows, labels, normalize)[0] == pytest.approx(100 * model.score(x.numpy(), labels.numpy()))


def test_gradient_vanishes_and_chunks_do_not_change_the_optimum(monkeypatch):
    rows, labels = some()
    start = torch.zeros(4, 8, dtype=torch.float64)
    weight, steps = solve(rows, labels, 4, 0.1, start=start, max_iterations=500)
    leaf = weight.clone().requires_grad_()
    x = torch.nn.functional.normalize(rows, dim=1)
    (torch.nn.functional.cross_entropy(x @ leaf.T, labels) + 0.1 / 240 * leaf.pow(2).sum()).backward()
    assert leaf.grad.abs().max() < 1e-6 and 1 < steps < 500
    monkeypatch.setattr("maskwise.evaluation.logistic._CELLS", 64)
    assert torch.allclose(weight, solve(rows, labels, 4, 0.1, start=start, max_iterations=500)[0], atol=1e-4)
    assert score(weight, rows, labels)[1] == 100.0  # four classes: every label is among the first five


def test_end_to_end():
    report = logistic(tiny_encoder(), sets(), penalty=[0.01, 1.0])
    numbers = report.numbers
    assert numbers["top1"] == max(numbers["top1_penalty0.01"], numbers["top1_penalty1"]) > 50 and numbers[
        "best_penalty"
    ] in (0.01, 1.0)
    assert "penalty (0.01, 1.0) instead of (0.01, 0.1, 1.0)" in (
        line.replace("[", "(").replace("]", ")") for line in report.protocol["differences"]
    )
    for options, reason in (
        ({"penalty": 0.0}, "penalty is 0.0; it must be above 0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
    ):
        with pytest.raises(UserError, match=reason):
            logistic(tiny_encoder(), sets(), **options)

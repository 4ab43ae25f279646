"""Multinomial logistic regression on frozen features, solved to its optimum."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bounds import Count, Positive
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.protocol import Options, as_tuple, labeled_sets
from maskwise.evaluation.report import Report, joint_hash
from maskwise.process.progress import counted

_CELLS = 1 << 25  # logits at a time: 128 MiB of float32
TOLERANCE = 1e-5  # largest entry of the gradient at the optimum
PAPER = {"penalty": (0.01, 0.1, 1.0), "max_iterations": 100, "feature": "pooled", "normalize": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticOptions(Options):
    """Options of logistic regression; penalty: one or several, the best on the test set is reported."""

    evaluation = "logistic"

    penalty: Positive | Sequence[Positive] = (0.01, 0.1, 1.0)
    feature: str = "pooled"
    normalize: bool = True
    max_iterations: Count = 100
    batch_size: Count = 256
    precision: str = "fp32"
    cache: object = None


def logistic(encoder, data: dict, world=None, **options) -> Report:
    """Fit multinomial logistic regression on features of data["train"] -> Report, accuracies on data["test"].

    options: those of `LogisticOptions`. iBOT's protocol: the k-NN features, L2-normalized, no intercept, mean
    cross-entropy + penalty / (2 n) |W|^2; several penalties are solved from the strongest to the weakest, each starting
    from the one before. L-BFGS replaces iBOT's external solver: the optimum is unique. Numbers: top1, top5 of the best
    penalty on the test set, as published, best_penalty, top1_penalty<p>. Raises UserError for options out of range.
    """
    begin, given = time.perf_counter(), LogisticOptions(**options)
    penalties, feature = as_tuple(given.penalty), given.feature
    if not penalties:
        raise UserError("logistic: no penalty given; give at least one above 0")
    data = labeled_sets("logistic", data, "train", "test")
    shared = {"world": world, "batch_size": given.batch_size, "precision": given.precision, "cache": given.cache}
    train, test = (extract.extract(encoder, data[role], feature, **shared) for role in ("train", "test"))
    device = next(encoder.parameters()).device
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    weight = torch.zeros(classes, train[feature].shape[1], device=device)
    scores, steps = {}, {}
    limits = {"normalize": given.normalize, "max_iterations": given.max_iterations}
    for penalty in counted(sorted(penalties, reverse=True), len(penalties), "penalties", "penalty"):
        weight, steps[penalty] = solve(train[feature], train.labels, classes, penalty, start=weight, **limits)
        scores[penalty] = score(weight, test[feature], test.labels, given.normalize)
    best = max(penalties, key=lambda penalty: scores[penalty][0])
    chosen = {"penalty": penalties, **limits, "feature": feature}
    images = len(train) + len(test)
    return Report(
        numbers={
            "top1": scores[best][0],
            "top5": scores[best][1],
            "best_penalty": float(best),
            **{f"top1_penalty{penalty:g}": scores[penalty][0] for penalty in penalties},
        },
        protocol={
            "evaluation": "logistic",
            "preset": "ibot",
            **chosen,
            "intercept": False,
            "precision": given.precision,
            "classes": classes,
            "train": len(train),
            "test": len(test),
            "iterations": {f"{penalty:g}": steps[penalty] for penalty in penalties},
            "selection": "best penalty on the test set, as published",
            "differences": [
                *(f"{key} {chosen[key]} instead of {value}" for key, value in PAPER.items() if chosen[key] != value),
                "L-BFGS instead of the external solver cyanure; the penalty is read as penalty / n, which the paper "
                "does not state",
            ],
        },
        data_hash=joint_hash(train.hash, test.hash),
        cost={
            "seconds": round(time.perf_counter() - begin, 3),
            "images": images,
            "images_per_second": round(images / max(1e-9, train.seconds + test.seconds), 1),
            "device": str(device),
            "features": {"train": train.origin[feature], "test": test.origin[feature]},
        },
        corrupt={**train.corrupt, **test.corrupt},
    )


def solve(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    *,
    start: Tensor | None = None,
    normalize: bool = True,
    max_iterations: int = 100,
) -> tuple[Tensor, int]:
    """Minimize mean cross-entropy + penalty / (2 n) |W|^2 on [n, F], int64 [n] -> weights [C, F], iterations.

    Computed on the device and in the precision of `start`, in chunks of bounded memory.
    """
    weight = torch.zeros(classes, rows.shape[1]) if start is None else start.detach().clone()
    total, gradient = len(rows), torch.zeros_like(weight)
    size = max(1, _CELLS // max(classes, rows.shape[1]))

    def objective() -> Tensor:
        loss = weight.new_zeros((), dtype=torch.float64)
        gradient.copy_(weight).mul_(penalty / total)
        for x, y in zip(rows.split(size), labels.split(size)):
            x, y = _prepared(x, weight, normalize), y.to(weight.device)
            logits = torch.log_softmax(x @ weight.T, dim=1)
            loss -= logits.gather(1, y[:, None]).double().sum() / total
            logits.exp_().scatter_add_(1, y[:, None], logits.new_full((len(y), 1), -1.0))
            gradient.addmm_(logits.T, x, alpha=1 / total)
        weight.grad = gradient
        return loss + penalty / (2 * total) * weight.double().pow(2).sum()

    optimizer = torch.optim.LBFGS(
        [weight],
        lr=1,
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=TOLERANCE / total**0.5,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    weight.requires_grad_(False)
    with torch.no_grad():
        optimizer.step(objective)
    return weight.detach(), optimizer.state[weight]["n_iter"]


def score(weight: Tensor, rows: Tensor, labels: Tensor, normalize: bool = True) -> tuple[float, float]:
    """Return top-1 and top-5 (or top-C) in per cent."""
    hits = torch.zeros(2, dtype=torch.int64)
    size = max(1, _CELLS // max(weight.shape))
    for x, y in zip(rows.split(size), labels.split(size)):
        logits = _prepared(x, weight, normalize) @ weight.T
        right = logits.topk(min(5, len(weight)), dim=1).indices.cpu() == y[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    return tuple((100 * hits.double() / max(1, len(rows))).tolist())


def _prepared(x: Tensor, like: Tensor, normalize: bool) -> Tensor:
    x = x.to(like)
    return F.normalize(x, dim=1) if normalize else x

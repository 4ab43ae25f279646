"""Logistic regression on frozen features: a convex problem, solved to its optimum."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.evaluation import features
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError

_CELLS = 1 << 25  # logits at a time: 128 MiB of float32
TOLERANCE = 1e-5  # largest entry of the gradient at the optimum
PAPER = {"penalty": (0.01, 0.1, 1.0), "max_iterations": 100, "feature": "pooled", "normalise": True}


def logistic(
    encoder, data: dict, world=None, *, penalty: float | Sequence[float] = (0.01, 0.1, 1.0), feature: str = "pooled", normalise: bool = True,
    max_iterations: int = 100, batch_size: int = 256, precision: str = "fp32", cache=None,
) -> Report:  # fmt: skip
    """Fit multinomial logistic regression on features of data["train"], score it on data["test"] -> Report, in per cent.

    iBOT's protocol: the k-NN features, L2-normalised, no intercept, mean cross-entropy + penalty / (2 n) |W|^2; several penalties are
    solved from the strongest to the weakest, each from the one before. L-BFGS instead of iBOT's external solver: the optimum is one.
    Numbers: top1, top5 of the best penalty on the test set, as published, best_penalty, top1_penalty<p>. Raises UserError for
    options out of range. attmask.md 5.5.
    """
    begin = time.perf_counter()
    penalties = tuple(penalty) if isinstance(penalty, (tuple, list)) else (penalty,)
    if not penalties or any(not one > 0 for one in penalties):
        raise UserError(f"logistic: penalty must be above 0, not {list(penalties)}")
    if max_iterations < 1:
        raise UserError(f"logistic: max_iterations is {max_iterations}; it must be at least 1")
    for role in ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"logistic needs labels, and the {role} images have none; give a folder with one subfolder per class")
    train, test = (
        features.extract(encoder, data[role], feature, world=world, batch_size=batch_size, precision=precision, cache=cache) for role in ("train", "test")
    )
    device = next(encoder.parameters()).device
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    weight, numbers, found, steps = torch.zeros(classes, train[feature].shape[1], device=device), {}, {}, {}
    for one in sorted(penalties, reverse=True):
        weight, steps[one] = solve(train[feature], train.labels, classes, one, start=weight, normalise=normalise, max_iterations=max_iterations)
        found[one] = score(weight, test[feature], test.labels, normalise)
    best = max(penalties, key=lambda one: found[one][0])
    numbers = {"top1": found[best][0], "top5": found[best][1], "best_penalty": float(best), **{f"top1_penalty{one:g}": found[one][0] for one in penalties}}
    seconds = time.perf_counter() - begin
    chosen = {"penalty": penalties, "max_iterations": max_iterations, "feature": feature, "normalise": normalise}
    lines = [f"{key} {chosen[key]} instead of {value}" for key, value in PAPER.items() if chosen[key] != value]
    lines.append("L-BFGS instead of the external solver cyanure; the penalty is read as penalty / n, which the paper does not state")
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "logistic", "preset": "ibot", **chosen, "intercept": False, "precision": precision, "classes": classes, "train": len(train),
            "test": len(test), "iterations": {f"{one:g}": steps[one] for one in penalties}, "selection": "best penalty on the test set, as published",
            "differences": lines,
        },
        data_hash=hashlib.sha256((train.hash + test.hash).encode()).hexdigest(),
        cost={
            "seconds": round(seconds, 3), "images": len(train) + len(test), "images_per_second": round((len(train) + len(test)) / max(1e-9, train.seconds + test.seconds), 1),
            "device": str(device), "features": {"train": train.origin[feature], "test": test.origin[feature]},
        },
        corrupt={**train.corrupt, **test.corrupt},
    )  # fmt: skip


def solve(
    rows: Tensor, labels: Tensor, classes: int, penalty: float, *, start: Tensor | None = None, normalise: bool = True, max_iterations: int = 100
) -> tuple[Tensor, int]:
    """The weights [C, F] that minimise mean cross-entropy + penalty / (2 n) |W|^2 on [n, F], int64 [n], and the iterations it took.

    Computed where `start` is, in its precision, in pieces of bounded memory.
    """
    weight = torch.zeros(classes, rows.shape[1]) if start is None else start.detach().clone()
    total, gradient = len(rows), torch.zeros_like(weight)
    size = max(1, _CELLS // max(classes, rows.shape[1]))

    def objective() -> Tensor:
        loss = weight.new_zeros((), dtype=torch.float64)
        gradient.copy_(weight).mul_(penalty / total)
        for x, y in zip(rows.split(size), labels.split(size)):
            x, y = _prepared(x, weight, normalise), y.to(weight.device)
            logits = torch.log_softmax(x @ weight.T, dim=1)
            loss -= logits.gather(1, y[:, None]).double().sum() / total
            logits.exp_().scatter_add_(1, y[:, None], logits.new_full((len(y), 1), -1.0))
            gradient.addmm_(logits.T, x, alpha=1 / total)
        weight.grad = gradient
        return loss + penalty / (2 * total) * weight.double().pow(2).sum()

    optimizer = torch.optim.LBFGS([weight], lr=1, max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=TOLERANCE / total**0.5, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe")
    weight.requires_grad_(False)
    with torch.no_grad():
        optimizer.step(objective)
    return weight.detach(), optimizer.state[weight]["n_iter"]


def score(weight: Tensor, rows: Tensor, labels: Tensor, normalise: bool = True) -> tuple[float, float]:
    """Top-1 and top-5 (or top-C) in per cent."""
    hits = torch.zeros(2, dtype=torch.int64)
    size = max(1, _CELLS // max(weight.shape))
    for x, y in zip(rows.split(size), labels.split(size)):
        right = (_prepared(x, weight, normalise) @ weight.T).topk(min(5, len(weight)), dim=1).indices.cpu() == y[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    return tuple((100 * hits.double() / max(1, len(rows))).tolist())


def _prepared(x: Tensor, like: Tensor, normalise: bool) -> Tensor:
    x = x.to(like)
    return F.normalize(x, dim=1) if normalise else x

"""Weighted k-nearest-neighbour classification: how good features are before anything is trained on them."""

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

_CELLS = 1 << 25  # entries of a similarity or vote matrix at a time: 128 MiB of float32
_PIECE = 1 << 17  # bank rows on the device at a time
_HEADLINE = 20  # the k of the published numbers (attmask.md 5.1)

# images per class -> (k, first file of each run); AttMask's few-shot protocol, attmask.md 5.2
FEW_SHOT = {1: (1, range(0, 21, 5)), 5: (20, range(0, 21, 5)), 10: (20, range(0, 41, 10)), 20: (20, range(0, 81, 20))}


def knn(
    encoder,
    data: dict,
    world=None,
    *,
    k: int | Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    feature: str | Sequence[str] = ("pooled", "patch_mean"),
    pixels: bool | int = False,
    few_shot: int | Sequence[int] = (),
    batch_size: int = 256,
    precision: str = "fp32",
    cache=None,
) -> Report:
    """Classify data["test"] by votes of the nearest images of data["train"] -> Report, accuracies in per cent.

    Neither set is augmented. Numbers: {feature}_top1_k{k} and _top5_k{k} for each k (at most the bank's size), the same of
    `pixels` (raw normalised ones, resized to 32 or the number given) and of few_shot images per class; `top1` and `top5`
    are the first feature's at k = 20, or at the first k. Raises UserError for sets without labels and for options out of range.
    precision and cache as in features.extract. attmask.md 5.1, 5.2; evaluation.md 2.
    """
    begin = time.perf_counter()
    names, asked, shots = _several(feature), _several(k), _several(few_shot)
    _check(data, names, pixels, asked, shots, temperature)
    size = 32 if pixels is True else int(pixels)
    options = {"world": world, "batch_size": batch_size}
    sides = {}
    if names:
        train, test = (features.extract(encoder, data[role], names, precision=precision, cache=cache, **options) for role in ("train", "test"))
        sides = {name: (train[name], test[name]) for name in names}
    if pixels:
        normal = {"mean": encoder.mean, "std": encoder.std}
        train, test = (features.pixels(data[role], size, **normal, **options) for role in ("train", "test"))
        sides["pixels"] = (train.pooled, test.pooled)
    device = next(encoder.parameters()).device
    numbers = {}
    for name, (bank, queries) in sides.items():
        found = accuracies(bank, train.labels, queries, test.labels, asked, temperature, device, world)
        numbers |= {f"{name}_top{top}_k{used}": value for used, both in found.items() for top, value in both.items()}
        for per_class in shots:
            few_k, runs = FEW_SHOT[per_class][0], few_shot_runs(train.labels, per_class).values()
            scores = [accuracies(bank[rows], train.labels[rows], queries, test.labels, (few_k,), temperature, device, world) for rows in runs]
            numbers[f"{name}_few_shot_{per_class}"] = sum(both[1] for score in scores for both in score.values()) / len(scores)
    headline = min(_HEADLINE if _HEADLINE in asked else asked[0], len(train))
    numbers = {top: numbers[f"{next(iter(sides))}_{top}_k{headline}"] for top in ("top1", "top5")} | numbers
    seconds, images = time.perf_counter() - begin, len(train) + len(test)
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "knn", "k": sorted({min(one, len(train)) for one in asked}), "k_asked": list(asked), "headline_k": headline,
            "temperature": temperature, "features": list(sides), "few_shot": list(shots), "pixels": size or None, "normalised": "L2", "precision": precision,
            "transform": "evaluation transform for both sets", "bank": len(train), "queries": len(test), "classes": _classes(train.labels, test.labels),
        },
        data_hash=hashlib.sha256((train.hash + test.hash).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": str(device)},
        corrupt={**train.corrupt, **test.corrupt},
    )  # fmt: skip


def knn_classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, temperature: float = 0.07, num_classes: int | None = None
) -> Tensor:
    """Rank the classes of each query by the votes exp(cosine / temperature) of its k nearest: [n, D], [n], [Q, D] -> int64 [Q, C].

    Features are normalised here; k is at most n. Classes without a vote come last, in index order. num_classes: by default
    the largest label + 1. Memory beyond the result is bounded. Raises UserError for an empty bank or k < 1. attmask.md 5.1.
    """
    classes = _classes(bank_labels) if num_classes is None else num_classes
    similarity, index = nearest(bank, queries, k)
    neighbours = bank_labels.to(index.device)[index]
    rows = max(1, _CELLS // max(1, classes))
    parts = [_ranking(votes(s, n, classes, temperature)) for s, n in zip(similarity.split(rows), neighbours.split(rows))]
    return torch.cat(parts) if parts else torch.zeros(0, classes, dtype=torch.int64)


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, device=None) -> tuple[Tensor, Tensor]:
    """The k bank rows of largest cosine: [n, D], [Q, D] -> (similarity [Q, k] falling, index int64 [Q, k]), on `device`.

    The bank passes in pieces, so that neither it nor the similarities need fit the device at once.
    """
    if not len(bank) or k < 1:
        raise UserError(f"k-NN with k = {k} on {len(bank)} images has nobody to ask; give at least one image and k >= 1")
    device = torch.device(device) if device is not None else queries.device
    queries, piece = _unit(queries.to(device)), max(k, min(len(bank), _PIECE))
    best, place = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    rows = max(1, _CELLS // piece)
    held = queries.new_empty(min(rows, len(queries)), piece)  # one matrix for all: a new one each time costs a third of the product
    for start in range(0, len(bank), piece):
        part = _unit(bank[start : start + piece].to(device)).T
        found = [torch.topk(torch.matmul(chunk, part, out=held[: len(chunk), : part.shape[1]]), min(k, part.shape[1]), dim=1) for chunk in queries.split(rows)]
        best = torch.cat([best, torch.cat([values for values, _ in found])], dim=1)
        place = torch.cat([place, torch.cat([index for _, index in found]) + start], dim=1)
        best, keep = torch.topk(best, min(k, best.shape[1]), dim=1)
        place = place.gather(1, keep)
    return best, place


def votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """Sum of exp(similarity / temperature) per class: [Q, k], int64 [Q, k] -> float64 [Q, C]; 0 only where nobody voted."""
    weights = torch.exp((similarity.double() / temperature).clamp(-700, 700))
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


def few_shot_indices(labels: Tensor, per_class: int, start: int) -> Tensor:
    """Files [start, start + per_class) of each class, counted in file order: int64 [n] -> int64 indices, in file order (attmask.md 5.2)."""
    labels = torch.as_tensor(labels)
    grouped = torch.argsort(labels, stable=True)
    _, counts = torch.unique_consecutive(labels[grouped], return_counts=True)
    rank = torch.arange(len(labels)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return grouped[(rank >= start) & (rank < start + per_class)].sort().values


def few_shot_runs(labels: Tensor, per_class: int) -> dict[int, Tensor]:
    """The published runs that the smallest class can fill: first file -> indices, in file order.

    Raises UserError where a class has fewer than per_class images, or per_class has no published runs. attmask.md 5.2.
    """
    if per_class not in FEW_SHOT:
        raise UserError(f"few-shot k-NN is defined for {', '.join(map(str, FEW_SHOT))} images per class, not {per_class}")
    smallest = int(torch.unique(torch.as_tensor(labels), return_counts=True)[1].min())
    if smallest < per_class:
        raise UserError(f"few-shot k-NN with {per_class} images per class, and the smallest class has {smallest}; ask for fewer, or give more images")
    return {start: few_shot_indices(labels, per_class, start) for start in FEW_SHOT[per_class][1] if start + per_class <= smallest}


def accuracies(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int], temperature: float = 0.07, device=None, world=None
) -> dict[int, dict[int, float]]:
    """Top-1 and top-5 of labelled queries [Q, D] -> {k: {1: per cent, 5: per cent}}, each k at most n; ranks share the queries."""
    device = torch.device(device) if device is not None else bank.device
    ks = sorted({min(one, len(bank)) for one in ks})
    mine = slice(None) if world is None else slice(world.rank, None, world.size)
    queries, labels, bank_labels = queries[mine], labels[mine].to(device), bank_labels.to(device)
    classes = _classes(bank_labels.cpu(), labels.cpu())
    similarity, index = nearest(bank, queries, ks[-1], device)
    hits = torch.zeros(len(ks), 2, dtype=torch.int64)
    rows = max(1, _CELLS // classes)
    for s, i, truth in zip(similarity.split(rows), index.split(rows), labels.split(rows)):
        for number, one in enumerate(ks):
            # The first min(5, k) classes count (evaluation.md 2).
            right = _ranking(votes(s[:, :one], bank_labels[i[:, :one]], classes, temperature))[:, : min(5, one)] == truth[:, None]
            hits[number] += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
    total = torch.tensor([len(labels)])
    if world is not None:
        hits, total = world.all_sum(hits), world.all_sum(total)
    return {one: dict(zip((1, 5), row)) for one, row in zip(ks, (100 * hits.double() / total).tolist())}


def _ranking(score: Tensor) -> Tensor:
    return torch.argsort(score, dim=1, descending=True, stable=True)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)


def _classes(*labels: Tensor) -> int:
    return max((int(some.max()) + 1 for some in labels if len(some)), default=1)


def _several(value) -> tuple:
    return (value,) if isinstance(value, (int, str)) else tuple(value)


def _check(data: dict, names: tuple, pixels: bool | int, ks: tuple, shots: tuple, temperature: float) -> None:
    """Refuse what cannot be evaluated before any image is read."""
    if not names and not pixels:
        raise UserError("k-NN has no feature to look at; give feature=pooled, feature=patch_mean or pixels=true")
    unknown = [name for name in names if name not in ("pooled", "patch_mean")]
    if unknown:
        raise UserError(f"k-NN knows no feature {unknown[0]!r}; choose pooled or patch_mean")
    if not ks or any(not isinstance(one, int) or one < 1 for one in ks):
        raise UserError(f"k-NN takes k >= 1, not k = {list(ks)}")
    if any(one not in FEW_SHOT for one in shots):
        raise UserError(f"few-shot k-NN is defined for {', '.join(map(str, FEW_SHOT))} images per class, not {list(shots)}")
    if not temperature > 0:
        raise UserError(f"the k-NN temperature is {temperature}; it must be above 0")
    for role in ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"k-NN needs labels, and the {role} images have none; give a folder with one subfolder per class")

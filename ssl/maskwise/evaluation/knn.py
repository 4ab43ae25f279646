"""Weighted k-NN classification of frozen features."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bounds import Count, NonNegativeInt, Positive
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.whitened_pixels import fit_whitening
from maskwise.evaluation.protocol import Options, as_tuple, labeled_sets
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional.precision import at_least_float32
from maskwise.process.progress import counting

_CELLS = 1 << 25  # entries of a similarity or vote matrix at a time: 128 MiB of float32
_PIECE = 1 << 17  # bank rows on the device at a time
_HEADLINE = 20  # the k of the published numbers
PIXEL_SIZE = 32  # of the baselines of pixels; 3072 numbers are what PCA takes in seconds

# images per class -> (k, first file of each run): few-shot protocol (README of AttMask's code, low-shot evaluation)
FEW_SHOT = {1: (1, range(0, 21, 5)), 5: (20, range(0, 21, 5)), 10: (20, range(0, 41, 10)), 20: (20, range(0, 81, 20))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNNOptions(Options):
    """Options of k-NN.

    k: neighbors, one or several; temperature of the votes; feature: pooled, patch_mean or both; pixels and
    whitened_pixels: also raw and PCA-whitened pixels resized to 32, or to the number given; few_shot: images per class
    of few-shot runs; precision and cache as in features.extract.
    """

    evaluation = "k-NN"

    k: int | Sequence[int] = (10, 20, 100, 200)
    temperature: Positive = 0.07
    feature: str | Sequence[str] = ("pooled", "patch_mean")
    pixels: bool | NonNegativeInt = False
    whitened_pixels: bool | NonNegativeInt = False
    few_shot: int | Sequence[int] = ()
    batch_size: Count = 256
    precision: str = "fp32"
    cache: object = None

    @property
    def ks(self) -> tuple[int, ...]:
        """k as a tuple."""
        return as_tuple(self.k)

    @property
    def pixel_sizes(self) -> dict[str, int]:
        """Side of raw and of whitened pixels, 0 for none."""
        asked = {"pixels": self.pixels, "whitened_pixels": self.whitened_pixels}
        return {name: PIXEL_SIZE if size is True else int(size) for name, size in asked.items()}


def knn(encoder, data: dict, world=None, **options) -> Report:
    """Classify data["test"] by votes of the nearest images of data["train"] -> Report, accuracies in per cent.

    options: those of `KNNOptions`. Neither set is augmented. Numbers: {feature}_top1_k{k} and _top5_k{k} for each k (at
    most the bank's size), the same for `pixels` and `whitened_pixels`, and {feature}_few_shot_{n}; `top1` and `top5`
    are the first feature's at k = 20, or at the first k. Raises UserError for sets without labels and for options out
    of range.
    """
    begin, chosen = time.perf_counter(), KNNOptions(**options)
    _check(chosen)
    data = labeled_sets("k-NN", data, "train", "test")
    train, test, sides, about_pixels = _features(encoder, data, world, chosen)
    device = next(encoder.parameters()).device
    numbers: dict[str, float] = {}
    for name, (bank, queries) in sides.items():
        shared = (queries, test.labels)
        scores = accuracies(bank, train.labels, *shared, chosen.ks, chosen.temperature, device, world)
        numbers |= {f"{name}_top{top}_k{k}": value for k, both in scores.items() for top, value in both.items()}
        for per_class in as_tuple(chosen.few_shot):
            k, runs = FEW_SHOT[per_class][0], few_shot_runs(train.labels, per_class).values()
            run_scores = [
                accuracies(bank[rows], train.labels[rows], *shared, (k,), chosen.temperature, device, world)
                for rows in runs
            ]
            top1 = [both[1] for score in run_scores for both in score.values()]
            numbers[f"{name}_few_shot_{per_class}"] = sum(top1) / len(run_scores)
    headline = min(_HEADLINE if _HEADLINE in chosen.ks else chosen.ks[0], len(train))
    first = next(iter(sides))
    numbers = {top: numbers[f"{first}_{top}_k{headline}"] for top in ("top1", "top5")} | numbers
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "knn",
            "k": sorted({min(k, len(train)) for k in chosen.ks}),
            "k_asked": list(chosen.ks),
            "headline_k": headline,
            "temperature": chosen.temperature,
            "features": list(sides),
            "few_shot": list(as_tuple(chosen.few_shot)),
            **about_pixels,
            "normalized": "L2",
            "precision": chosen.precision,
            "transform": "evaluation transform for both sets",
            "bank": len(train),
            "queries": len(test),
            "classes": _classes(train.labels, test.labels),
        },
        data_hash=joint_hash(train.hash, test.hash),
        cost=cost(begin, len(train) + len(test), device),
        corrupt={**train.corrupt, **test.corrupt},
    )


def _features(encoder, data: dict, world, chosen: KNNOptions):
    """Return train bank, test bank, {feature name: (train rows, test rows)} and the protocol of pixels."""
    shared, sides = {"world": world, "batch_size": chosen.batch_size}, {}
    about: dict = dict.fromkeys(chosen.pixel_sizes)
    names = as_tuple(chosen.feature)
    if names:
        train, test = (
            extract.extract(encoder, data[role], names, precision=chosen.precision, cache=chosen.cache, **shared)
            for role in ("train", "test")
        )
        sides = {name: (train[name], test[name]) for name in names}
    shared |= {"mean": encoder.mean, "std": encoder.std}
    for size in sorted({*chosen.pixel_sizes.values()} - {0}):
        train, test = (extract.pixels(data[role], size, **shared) for role in ("train", "test"))
        if chosen.pixel_sizes["pixels"] == size:
            sides["pixels"], about["pixels"] = (train.pooled, test.pooled), size
        if chosen.pixel_sizes["whitened_pixels"] == size:
            whitening, fitted = fit_whitening(train.pooled, next(encoder.parameters()).device)
            sides["whitened_pixels"] = (whitening(train.pooled), whitening(test.pooled))
            about["whitened_pixels"] = {"size": size, **fitted}
    return train, test, sides, about


def knn_classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Rank the classes of each query by the votes of its k nearest bank rows.

    bank [n, D], bank_labels int64 [n], queries [Q, D] -> int64 [Q, C]. A vote weighs exp(cosine / temperature).
    Features are normalized here; k is at most n. Classes without a vote come last, in index order. num_classes: by
    default the largest label + 1. Memory beyond the result is bounded. Raises UserError for an empty bank or k < 1.
    """
    classes = _classes(bank_labels) if num_classes is None else num_classes
    similarity, index = nearest(bank, queries, k)
    neighbors = bank_labels.to(index.device)[index]
    rows = max(1, _CELLS // max(1, classes))
    parts = [_ranking(votes(s, n, classes, temperature)) for s, n in zip(similarity.split(rows), neighbors.split(rows))]
    return torch.cat(parts) if parts else torch.zeros(0, classes, dtype=torch.int64)


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int, device=None) -> tuple[Tensor, Tensor]:
    """Find the k bank rows of largest cosine for each query.

    bank [n, D], queries [Q, D] -> (similarity [Q, k] in descending order, index int64 [Q, k]).
    The bank is moved to `device` in chunks, so that neither it nor the similarities must fit there at once.
    """
    if not len(bank) or k < 1:
        raise UserError(f"k-NN needs k >= 1 and at least one training image (got k = {k}, {len(bank)} images)")
    device = torch.device(device) if device is not None else queries.device
    queries, piece = _unit(queries.to(device)), max(k, min(len(bank), _PIECE))
    best = queries.new_empty(len(queries), 0)
    place = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    rows = max(1, _CELLS // piece)
    # One buffer for all products: a new allocation each time takes a third of the time of the product.
    buffer = queries.new_empty(min(rows, len(queries)), piece)
    with counting(len(queries), "queries", "query") as progress:
        for start in range(0, len(bank), piece):
            part = _unit(bank[start : start + piece].to(device)).T
            tops = []
            for chunk in queries.split(rows):
                similarity = torch.matmul(chunk, part, out=buffer[: len(chunk), : part.shape[1]])
                tops.append(torch.topk(similarity, min(k, part.shape[1]), dim=1))
                progress.add(len(chunk) * part.shape[1] / len(bank))
            best = torch.cat([best, torch.cat([values for values, _ in tops])], dim=1)
            place = torch.cat([place, torch.cat([index for _, index in tops]) + start], dim=1)
            best, keep = torch.topk(best, min(k, best.shape[1]), dim=1)
            place = place.gather(1, keep)
    return best, place


def votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """Sum exp(similarity / temperature) per class: [Q, k], int64 [Q, k] -> float64 [Q, C]; 0 only without a vote."""
    weights = torch.exp((similarity.double() / temperature).clamp(-700, 700))
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


def few_shot_indices(labels: Tensor, per_class: int, start: int) -> Tensor:
    """Select files [start, start + per_class) of each class: labels int64 [n] -> int64 indices, in file order."""
    labels = torch.as_tensor(labels)
    grouped = torch.argsort(labels, stable=True)
    _, counts = torch.unique_consecutive(labels[grouped], return_counts=True)
    rank = torch.arange(len(labels)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return grouped[(rank >= start) & (rank < start + per_class)].sort().values


def few_shot_runs(labels: Tensor, per_class: int) -> dict[int, Tensor]:
    """Return the published runs that the smallest class can fill: first file -> indices, in file order.

    Raises UserError where a class has fewer than per_class images, or per_class has no published runs.
    """
    if per_class not in FEW_SHOT:
        raise UserError(
            f"few-shot k-NN is defined for {', '.join(map(str, FEW_SHOT))} images per class, not {per_class}"
        )
    smallest = int(torch.unique(torch.as_tensor(labels), return_counts=True)[1].min())
    if smallest < per_class:
        raise UserError(
            f"few-shot k-NN with {per_class} images per class: the smallest class has {smallest}; choose fewer, "
            "or give more images"
        )
    return {
        start: few_shot_indices(labels, per_class, start)
        for start in FEW_SHOT[per_class][1]
        if start + per_class <= smallest
    }


def accuracies(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    device=None,
    world=None,
) -> dict[int, dict[int, float]]:
    """Score labeled queries [Q, D] -> {k: {1: top-1, 5: top-5}} in per cent; ranks share the queries.

    Each k is at most n.
    """
    device = torch.device(device) if device is not None else bank.device
    ks = sorted({min(k, len(bank)) for k in ks})
    mine = slice(None) if world is None else slice(world.rank, None, world.size)
    queries, labels, bank_labels = queries[mine], labels[mine].to(device), bank_labels.to(device)
    classes = _classes(bank_labels.cpu(), labels.cpu())
    similarity, index = nearest(bank, queries, ks[-1], device)
    hits = torch.zeros(len(ks), 2, dtype=torch.int64)
    rows = max(1, _CELLS // classes)
    for s, i, truth in zip(similarity.split(rows), index.split(rows), labels.split(rows)):
        for number, k in enumerate(ks):
            ranking = _ranking(votes(s[:, :k], bank_labels[i[:, :k]], classes, temperature))
            right = ranking[:, : min(5, k)] == truth[:, None]  # of k < 5 neighbors, k classes at most have votes
            hits[number] += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
    total = torch.tensor([len(labels)])
    if world is not None:
        hits, total = world.all_sum(hits), world.all_sum(total)
    return {k: dict(zip((1, 5), row)) for k, row in zip(ks, (100 * hits.double() / total).tolist())}


def _ranking(score: Tensor) -> Tensor:
    return torch.argsort(score, dim=1, descending=True, stable=True)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(at_least_float32(rows), dim=1)


def _classes(*labels: Tensor) -> int:
    return max((int(part.max()) + 1 for part in labels if len(part)), default=1)


def _check(chosen: KNNOptions) -> None:
    """Raise UserError for options that cannot be evaluated, before any image is read."""
    names, ks, shots = (as_tuple(value) for value in (chosen.feature, chosen.k, chosen.few_shot))
    if not names and not any(chosen.pixel_sizes.values()):
        raise UserError("k-NN has no feature; give feature=pooled, feature=patch_mean or pixels=true")
    unknown = [name for name in names if name not in ("pooled", "patch_mean")]
    if unknown:
        raise UserError(f"k-NN has no feature {unknown[0]!r}; choose pooled or patch_mean")
    if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
        raise UserError(f"k-NN needs k >= 1 (got k = {list(ks)})")
    if any(shot not in FEW_SHOT for shot in shots):
        defined = ", ".join(map(str, FEW_SHOT))
        raise UserError(f"few-shot k-NN is defined for {defined} images per class, not {list(shots)}")

"""Measures of what predictions are worth, as functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 1 << 25  # similarities at a time: 128 MiB of float32


def revisited_map(ranks: Tensor, ground_truth: Sequence[Mapping], ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict]:
    """Trapezoid mAP and mP@k of revisited Oxford and Paris -> {"easy"|"medium"|"hard": {"map", "ap" [Q], "mp" [len(ks)]}}, fractions.

    ranks: int64 [database, queries], indices by falling similarity, possibly cut short; ground_truth: one {easy, hard, junk} a query.
    Easy counts easy images and ignores hard and junk; medium counts both and ignores junk; hard counts hard ones and ignores the
    others. A query without positives is NaN and leaves the means; positives that are not in the list count as missed.
    evaluation.md 8.
    """
    ranks = torch.as_tensor(ranks).cpu()
    split = {"easy": (("easy",), ("junk", "hard")), "medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("junk", "easy"))}
    found = {}
    for name, (wanted, ignored) in split.items():
        scores = [average_precision(ranks[:, q], *(_joined(truth, keys) for keys in (wanted, ignored)), ks) for q, truth in enumerate(ground_truth)]
        ap = torch.tensor([ap for ap, _ in scores], dtype=torch.float64)
        precision = torch.tensor([mp for _, mp in scores], dtype=torch.float64).reshape(len(scores), len(ks))
        found[name] = {"map": float(ap.nanmean()), "ap": ap, "mp": precision.nanmean(dim=0).tolist()}
    return found


def average_precision(ranks: Tensor, positives: Tensor, ignored: Tensor, ks: Sequence[int] = ()) -> tuple[float, list[float]]:
    """Area under the precision-recall curve by trapezoids, and precision among the first k, for one query: indices [n], [P], [I].

    Ignored images leave the list first. With r_j the 0-based rank of the j-th positive, AP = sum of (j / r_j + (j + 1) / (r_j + 1)) / 2
    over the positives, divided by P; j / r_j is 1 at rank 0. Precision looks at the first min(k, rank of the last positive)
    images. NaN without positives; 0 where none is found. evaluation.md 8.
    """
    if not len(positives):
        return float("nan"), [float("nan")] * len(ks)
    kept = ranks[~torch.isin(ranks, ignored)]
    right = torch.isin(kept, positives)
    r = right.nonzero().flatten().double()
    if not len(r):
        return 0.0, [0.0] * len(ks)
    j = torch.arange(len(r), dtype=torch.float64)
    before = torch.where(r == 0, 1.0, j / r.clamp(min=1))
    area = float(((before + (j + 1) / (r + 1)) / 2).sum() / len(positives))
    reach = [min(k, int(r[-1]) + 1) for k in ks]
    return area, [float(right[:q].sum()) / q for q in reach]


def _joined(truth: Mapping, keys: Sequence[str]) -> Tensor:
    parts = [torch.as_tensor(truth.get(key, ()), dtype=torch.int64).flatten() for key in keys]
    return torch.cat(parts).unique()


def recall_at_k(features: Tensor, labels: Tensor, ks: Sequence[int], gallery: tuple[Tensor, Tensor] | None = None) -> dict[int, float]:
    """Share of images with one of their class among their k nearest by cosine: [n, D], int64 [n] -> {k: per cent}.

    Without a gallery (features, labels) the images are searched among themselves, each left out of its own list by its index.
    Equal similarities rank by index. Memory is bounded. evaluation.md 9.
    """
    queries = F.normalize(_full(features), dim=1)
    bank, bank_labels = (queries, labels) if gallery is None else (F.normalize(_full(gallery[0]), dim=1), gallery[1])
    labels, bank_labels = labels.to(queries.device), bank_labels.to(queries.device)
    ahead = [first_right(queries[rows] @ bank.T, labels[rows][:, None] == bank_labels, rows if gallery is None else None) for rows in _chunks(len(queries), len(bank))]
    ahead = torch.cat(ahead) if ahead else torch.zeros(0)
    return {int(k): 100.0 * float((ahead < k).double().mean()) for k in ks}


def first_right(similarity: Tensor, right: Tensor, own: Tensor | None = None) -> Tensor:
    """How many rank before the first right one: [q, n], bool [q, n] -> int64 [q], n where none is right; `own` [q] are columns to leave out."""
    if own is not None:
        row = torch.arange(len(own), device=similarity.device)
        right = right.clone()
        right[row, own] = False
        similarity = similarity.clone()
        similarity[row, own] = -float("inf")
    inside = similarity.masked_fill(~right, -float("inf"))
    best = inside.max(dim=1, keepdim=True).values
    at = (right & (similarity == best)).int().argmax(dim=1, keepdim=True)  # argmax of equals: the lowest index
    column = torch.arange(similarity.shape[1], device=similarity.device)
    before = (similarity > best) | ((similarity == best) & (column < at))
    return torch.where(right.any(dim=1), before.sum(dim=1), similarity.shape[1])


def feature_variance(maps: Tensor) -> dict[str, float]:
    """How unlike the features of a layer are: [B, C, H, W] -> {"spatial", "channel"}, means over the images.

    spatial: unbiased variance over positions, averaged over channels; channel: unbiased variance over channels, averaged over
    positions; NaN where there is one of them only. Park and Kim 2022, MAP fig. 2; evaluation.md 13.
    """
    flat = _full(maps).flatten(2)
    return {"spatial": _variance(flat, 2), "channel": _variance(flat, 1)}


def _variance(flat: Tensor, dim: int) -> float:
    return float(flat.var(dim=dim).double().mean()) if flat.shape[dim] > 1 else float("nan")


def token_errors(each: Tensor, together: Tensor, labels: Tensor) -> dict[str, float]:
    """Zero-one error of several predictors taken apart: classes int64 [n, k], [n] and [n] -> {"bias", "variance", "error"}, per cent.

    bias: how often the joint prediction is wrong; variance: how often a single one is not the joint one, averaged over the k; error:
    how often a single one is wrong. MAP eq. 2, after Domingos 2000.
    """
    found = {"bias": together != labels, "variance": each != together[:, None], "error": each != labels[:, None]}
    return {name: 100.0 * float(wrong.double().mean()) for name, wrong in found.items()}


def _chunks(rows: int, columns: int) -> list[Tensor]:
    return list(torch.arange(rows).split(max(1, _CELLS // max(1, columns)))) if rows else []


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

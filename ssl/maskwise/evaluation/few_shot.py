"""Few-shot k-NN: accuracy with a few labeled images per class, as in AttMask."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from maskwise.bounds import Count, Positive
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, feature_names
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.knn import FEW_SHOT, accuracies, few_shot_runs
from maskwise.evaluation.protocol import Options, as_tuple, labeled_sets
from maskwise.evaluation.report import Report, cost, joint_hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotOptions(Options):
    """Options of few-shot k-NN; per_class: images per class, one or several of 1, 5, 10, 20."""

    evaluation = "few-shot k-NN"

    per_class: int | Sequence[int] = tuple(FEW_SHOT)
    feature: str = "pooled"
    temperature: Positive = 0.07
    batch_size: Count = 256


def few_shot(encoder, data: dict, world=None, **options) -> Report:
    """Score k-NN of data["test"] among n images of each class of data["train"] -> Report, accuracies in per cent.

    options: those of `FewShotOptions`. As AttMask: files [start, start + n) of each class in order, k = 1 for n = 1 and
    20 otherwise, mean over five starts (0, 5, .., 20 for 1 and 5, 0, 10, .., 40 for 10, 0, 20, .., 80 for 20), the
    whole test set, no augmentation. Starts that the smallest class cannot fill are left out and listed. Numbers:
    `top1_n` and its standard deviation over the starts, `std_n`; `protocol["runs"]` holds every start's. Only images
    used by a run are read. Raises UserError for another n, for sets without labels and for classes that are too small.
    """
    begin, chosen = time.perf_counter(), FewShotOptions(**options)
    shots = as_tuple(chosen.per_class)
    if not shots:
        accepted = ", ".join(map(str, FEW_SHOT))
        raise UserError(f"few-shot k-NN has no number of images per class; give per_class=[{accepted}]")
    data = labeled_sets("few-shot k-NN", data, "train", "test")
    train, labels = data["train"], torch.as_tensor(data["train"].labels)
    runs = {n: few_shot_runs(labels, n) for n in shots}
    used = torch.unique(torch.cat([rows for starts in runs.values() for rows in starts.values()]))
    feature_names.check(encoder, (chosen.feature,), "fp32")
    shared = {"world": world, "batch_size": chosen.batch_size}
    test = extract.extract(encoder, data["test"], chosen.feature, **shared)
    rows, index, corrupt = extract.extract_rows(encoder, train, (chosen.feature,), used, device=test.device, **shared)
    extract.require_images(len(index), train, corrupt)
    scores = run_scores(runs, rows[chosen.feature], index, labels, test, chosen, world)
    numbers = {f"top1_{n}": statistics.fmean(by_start.values()) for n, by_start in scores.items()}
    numbers |= {
        f"std_{n}": statistics.stdev(by_start.values()) if len(by_start) > 1 else 0.0 for n, by_start in scores.items()
    }
    left_out = {n: [start for start in FEW_SHOT[n][1] if start not in runs[n]] for n in shots}
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "few_shot",
            "per_class": list(shots),
            "k": {n: FEW_SHOT[n][0] for n in shots},
            "runs": scores,
            "feature": chosen.feature,
            "temperature": chosen.temperature,
            "normalized": "L2",
            "queries": len(test),
            "classes": len(labels.unique()),
            "differences": [
                f"{n} per class: starts {starts} left out, the smallest class is too small"
                for n, starts in left_out.items()
                if starts
            ],
        },
        data_hash=joint_hash(fingerprint(train), test.hash),
        cost=cost(begin, len(index) + len(test), test.device),
        corrupt={**corrupt, **test.corrupt},
    )


def run_scores(
    runs: dict[int, dict[int, Tensor]], rows: Tensor, index: Tensor, labels: Tensor, test, chosen: FewShotOptions, world
) -> dict[int, dict[int, float]]:
    """Return {images per class: {start: top-1}}; rows [m, D] are the features of the training images `index` [m]."""
    place = torch.full((len(labels),), -1)
    place[index] = torch.arange(len(index))
    scores: dict[int, dict[int, float]] = {}
    for n, starts in runs.items():
        scores[n] = {}
        for start, files in starts.items():
            files = files[place[files] >= 0]  # without unreadable images
            bank, queries = rows[place[files]], test[chosen.feature]
            k, shared = (FEW_SHOT[n][0],), (chosen.temperature, test.device, world)
            by_k = accuracies(bank, labels[files], queries, test.labels, k, *shared)
            scores[n][start] = next(iter(by_k.values()))[1]
    return scores

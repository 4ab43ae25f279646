"""Few-shot k-NN: how far a handful of labelled images per class goes."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence

import torch

from maskwise.evaluation import features
from maskwise.evaluation.knn import FEW_SHOT, accuracies, few_shot_runs
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError


def few_shot(
    encoder, data: dict, world=None, *, per_class: int | Sequence[int] = tuple(FEW_SHOT), feature: str = "pooled", temperature: float = 0.07,
    batch_size: int = 256,
) -> Report:  # fmt: skip
    """k-NN of data["test"] among so many images of each class of data["train"] -> Report, accuracies in per cent.

    As AttMask: the files [start, start + n) of each class in their order, k = 1 for n = 1 and 20 otherwise, mean over five starts
    (0, 5, .., 20 for 1 and 5, 0, 10, .., 40 for 10, 0, 20, .., 80 for 20), the whole test set, no augmentation. Starts that the
    smallest class cannot fill are left out, and the report says so. Numbers: `top1_n` and its standard deviation over the starts,
    `std_n`, for each n; `protocol["runs"]` holds every start's. Only images that some run uses are read.
    Raises UserError for another n, for sets without labels and for classes that are too small. attmask.md 5.2.
    """
    begin = time.perf_counter()
    shots = (per_class,) if isinstance(per_class, int) else tuple(per_class)
    if not shots:
        raise UserError(f"few-shot k-NN has no number of images per class; give per_class=[{', '.join(map(str, FEW_SHOT))}]")
    for role in ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"few-shot k-NN needs labels, and the {role} images have none; give a folder with one subfolder per class")
    if not temperature > 0:
        raise UserError(f"the k-NN temperature is {temperature}; it must be above 0")
    train, labels = data["train"], torch.as_tensor(data["train"].labels)
    runs = {n: few_shot_runs(labels, n) for n in shots}
    used = torch.unique(torch.cat([rows for starts in runs.values() for rows in starts.values()]))
    features.check(encoder, (feature,), "fp32")
    test = features.extract(encoder, data["test"], feature, world=world, batch_size=batch_size)
    bank, index, corrupt = features.extract_rows(encoder, train, (feature,), used, world=world, batch_size=batch_size, device=test.device)
    place = torch.full((len(labels),), -1)
    place[index] = torch.arange(len(index))
    scores: dict[int, dict[int, float]] = {}
    for n, starts in runs.items():
        scores[n] = {}
        for start, rows in starts.items():
            rows = rows[place[rows] >= 0]  # unreadable images are missing
            found = accuracies(bank[feature][place[rows]], labels[rows], test[feature], test.labels, (FEW_SHOT[n][0],), temperature, test.device, world)
            scores[n][start] = next(iter(found.values()))[1]
    numbers = {f"top1_{n}": statistics.fmean(runs.values()) for n, runs in scores.items()}
    numbers |= {f"std_{n}": statistics.stdev(runs.values()) if len(runs) > 1 else 0.0 for n, runs in scores.items()}
    seconds, images = time.perf_counter() - begin, len(index) + len(test)
    left = {n: [start for start in FEW_SHOT[n][1] if start not in runs[n]] for n in shots}
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "few_shot", "per_class": list(shots), "k": {n: FEW_SHOT[n][0] for n in shots}, "runs": scores, "feature": feature,
            "temperature": temperature, "normalised": "L2", "queries": len(test), "classes": len(labels.unique()),
            "differences": [f"{n} per class: starts {starts} left out, the smallest class is too small" for n, starts in left.items() if starts],
        },
        data_hash=hashlib.sha256((features.fingerprint(train) + test.hash).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": test.device},
        corrupt={**corrupt, **test.corrupt},
    )  # fmt: skip

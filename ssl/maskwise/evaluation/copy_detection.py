"""Copy detection on Copydays: retrieval of the original of a modified copy."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from maskwise.bounds import Count
from maskwise.data.class_matching import numbered_like
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.features.views import Square
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost
from maskwise.evaluation.retrieval import ranking
from maskwise.functional.metrics import average_precision

TOP = 20  # neighbors that count
GEM_POWER, GEM_FLOOR = 4.0, 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyDetectionOptions(Options):
    """Options of copy detection.

    size: side of the resized images (default: the encoder's; published 320 for DINO, 224 for iBOT); whitening: by the
    covariance of data["whitening"] (default: where it is given); top: an original at a later rank counts as missed.
    """

    evaluation = "copy detection"

    size: Count | None = None
    whitening: bool | None = None
    top: Count = TOP
    batch_size: Count = 64


def copy_detection(encoder, data: dict, world=None, **options) -> Report:
    """Compute mAP of each group of copies against originals and distractors -> Report, in per cent.

    data: "copies", {group: images}; "database"; "distractors" and "whitening" if given. options: those of
    `CopyDetectionOptions`. Images are resized to size x size. The feature is the pooled vector concatenated with the
    generalized mean (power 4) of the patch tokens. Each copy has one original.
    """
    begin, chosen = time.perf_counter(), CopyDetectionOptions(**options)
    if "database" not in data or not data.get("copies"):
        raise UserError(
            "copy detection has no originals or no copies; give test=FOLDER that holds original/ and strong/"
        )
    whiten = "whitening" in data if chosen.whitening is None else chosen.whitening
    if whiten and "whitening" not in data:
        raise UserError("copy detection: whitening needs images of its own; give whitening=FOLDER, or whitening=false")
    view, device = Square(chosen.size or max(encoder.image_size)), next(encoder.parameters()).device
    corrupt: dict[str, str] = {}
    shared = {"world": world, "batch_size": chosen.batch_size}
    bank, index = descriptors(encoder, data["database"], view, corrupt, **shared)
    labels = data["database"].labels[index]
    if "distractors" in data:
        distractors, _ = descriptors(encoder, data["distractors"], view, corrupt, **shared)
        bank, labels = torch.cat([bank, distractors]), torch.cat([labels, torch.full((len(distractors),), -1)])
    images, mean, rotation = len(bank), torch.zeros(1), None
    if whiten:
        mean, rotation = whitener(descriptors(encoder, data["whitening"], view, corrupt, **shared)[0])
    numbers = {}
    for group, copies in data["copies"].items():
        copies = numbered_like(copies, data["database"], "copy detection", f"the copies {group}", "the originals")
        queries, index = descriptors(encoder, copies, view, corrupt, **shared)
        images += len(queries)
        whitened = [rows if rotation is None else (rows - mean) @ rotation for rows in (bank, queries)]
        ranks = ranking(*whitened, device=device)[: chosen.top]
        numbers[f"{group}_map"] = mean_average_precision(ranks, labels, copies.labels[index])
    other_size = view.size not in (224, 320)
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "copy_detection",
            "size": view.size,
            "feature": f"pooled vector and GeM of patches (power {GEM_POWER:g}), concatenated",
            "whitening": whiten,
            "top": chosen.top,
            "preset": "dino",
            "differences": [
                *([f"{view.size} pixels instead of 320 (DINO) or 224 (iBOT)"] if other_size else []),
                *([] if whiten else ["no whitening"]),
                *([] if "distractors" in data else ["no distractors"]),
            ],
            "database": len(bank),
            "distractors": len(data["distractors"]) if "distractors" in data else 0,
            "copies": {name: len(copies) for name, copies in data["copies"].items()},
        },
        data_hash=fingerprint(data["database"]),
        cost=cost(begin, images, device),
        corrupt=corrupt,
    )


def mean_average_precision(ranks: Tensor, labels: Tensor, queries: Tensor) -> float:
    """Return mAP in per cent of ranks int64 [top, Q] by labels of the database [n] and of the queries [Q]."""
    scores = [
        average_precision(ranks[:, q], (labels == label).nonzero().flatten(), torch.zeros(0))[0]
        for q, label in enumerate(queries)
    ]
    return 100 * float(torch.tensor(scores).nanmean())


def descriptors(encoder, dataset, view, corrupt: dict, *, world=None, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return pooled vectors and GeM of patch tokens, [n, 2 D] in the dataset's order, and index int64 [n]."""
    rows = extract.rank_share(len(dataset), world, batch_size)
    width = encoder.dim + getattr(encoder, "patch_dim", encoder.dim)
    parts, index = [torch.zeros(0, width)], [torch.zeros(0, dtype=torch.int64)]
    for numbers, _, features in extract.stream(
        encoder, dataset, rows=rows, view=view, batch_size=batch_size, corrupt=corrupt
    ):
        parts.append(torch.cat([features.pooled.float(), gem(features.patches)], dim=1).cpu())
        index.append(numbers)
    vectors, index = torch.cat(parts), torch.cat(index)
    if world is not None and world.size > 1:
        vectors, index = world.gather(vectors), world.gather(index)
        for part in world.gather_objects(dict(corrupt)):
            corrupt |= part
    extract.require_images(len(index), dataset, corrupt)
    order = torch.argsort(index)
    return vectors[order], index[order]


def gem(patches: Tensor, power: float = GEM_POWER) -> Tensor:
    """Compute the generalized mean over patches, clamped at 1e-6: [B, N, D] -> float32 [B, D]."""
    return patches.float().clamp(min=GEM_FLOOR).pow(power).mean(dim=1).pow(1 / power)


def whitener(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [D] and PCA whitening [D, r] of [n, D]; directions without variance are left out."""
    rows = rows.double()
    mean = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / max(1, len(rows)))
    varying = values > values[-1] * 1e-8
    return mean.float(), (vectors[:, varying] * values[varying].rsqrt()).float()

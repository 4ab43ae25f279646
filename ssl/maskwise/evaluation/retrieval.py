"""Landmark retrieval on revisited Oxford and Paris: official protocol and that of the DINO papers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, views
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.protocol import Options, as_tuple
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional.metrics import revisited_map

# variant -> (crop the query to its box, largest side in pixels)
VARIANTS = {"official": (True, 1024), "papers": (False, 224)}
MULTI_SCALE = (1.0, 2**-0.5, 0.5)
_CELLS = 1 << 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalOptions(Options):
    """Options of retrieval.

    long_side: largest side of the images (default: 1024 official, 224 papers); multi_scale: average features at scales
    1, 2^-1/2 and 1/2; ks: ranks of mP@k.
    """

    evaluation = "retrieval"

    variants: str | Sequence[str] = ("official", "papers")
    long_side: Count | None = None
    multi_scale: bool = False
    feature: str = "pooled"
    ks: Count | Sequence[Count] = (1, 5, 10)
    cache: object = None


def retrieval(encoder, data: dict, world=None, **options) -> Report:
    """Compute revisited mAP and mP@k of data["query"] against data["database"], by variant -> Report, in per cent.

    options: those of `RetrievalOptions`. data also holds "ground_truth": {bbx, easy, hard, junk} per query. Images have
    their aspect ratio and batch size 1; the longer side is downscaled, then cropped to whole patches. Similarity is
    cosine; ties rank by index.
    """
    begin, chosen = time.perf_counter(), RetrievalOptions(**options)
    variants, ks = as_tuple(chosen.variants), as_tuple(chosen.ks)
    if not variants or any(name not in VARIANTS for name in variants):
        raise UserError(f"retrieval: variants {list(variants)}; choose from {', '.join(VARIANTS)}")
    lacking = [role for role in ("query", "database", "ground_truth") if role not in data]
    if lacking:
        raise UserError(
            f"retrieval has no {' and no '.join(lacking)}; give test=FOLDER that holds gnd_<name>.pkl and jpg/"
        )
    device = next(encoder.parameters()).device
    sides = {name: chosen.long_side or VARIANTS[name][1] for name in variants}
    numbers, banks = {}, {}
    for name in variants:
        database, queries = variant_banks(encoder, data, world, chosen, name, banks)
        ranks = ranking(database[chosen.feature], queries[chosen.feature], database.index, device)
        truth = [data["ground_truth"][q] for q in queries.index.tolist()]
        for level, scores in revisited_map(ranks, truth, ks).items():
            numbers[f"{name}_{level}_map"] = 100 * scores["map"]
            numbers |= {f"{name}_{level}_mp{k}": 100 * value for k, value in zip(ks, scores["mp"])}
    crops = {True: "query cropped to its box", False: "query not cropped"}
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "retrieval",
            "variants": {name: f"{crops[VARIANTS[name][0]]}, longer side at most {sides[name]}" for name in variants},
            "differences": [
                f"{name}: longer side at most {sides[name]} instead of {VARIANTS[name][1]}"
                for name in variants
                if sides[name] != VARIANTS[name][1]
            ],
            "average_precision": "trapezoid, as revisited Oxford and Paris define it",
            "multi_scale": list(MULTI_SCALE) if chosen.multi_scale else None,
            "feature": chosen.feature,
            "queries": len(data["query"]),
            "database": len(data["database"]),
        },
        data_hash=joint_hash(*(fingerprint(data[role]) for role in ("query", "database"))),
        cost=cost(begin, sum(map(len, banks.values())), device),
        corrupt={name: reason for bank in banks.values() for name, reason in bank.corrupt.items()},
    )


def variant_banks(encoder, data: dict, world, chosen: RetrievalOptions, variant: str, banks: dict):
    """Return database and query features of a variant; `banks` holds those already extracted, by role and view."""
    crop, longest = VARIANTS[variant]
    patch = views.patch_of(encoder)
    scaled = views.Scales(encoder, MULTI_SCALE, patch) if chosen.multi_scale else encoder
    boxes = tuple(tuple(truth["bbx"].tolist()) for truth in data["ground_truth"])
    pair = []
    for role in ("database", "query"):
        view = views.Downscaled(chosen.long_side or longest, patch, boxes if crop and role == "query" else None)
        if (role, view) not in banks:
            shared = {"world": world, "batch_size": 1, "view": view, "cache": chosen.cache}
            banks[role, view] = extract.extract(scaled, data[role], chosen.feature, **shared)
        pair.append(banks[role, view])
    return pair


def ranking(bank: Tensor, queries: Tensor, names: Tensor | None = None, device=None) -> Tensor:
    """Rank the database by cosine for each query: [n, D], [Q, D] -> int64 [n, Q], nearest first.

    Ties go to the lowest index. names: int64 [n], returned instead of row numbers.
    """
    device = torch.device(device) if device is not None else bank.device
    bank, queries = (F.normalize(rows.float().to(device), dim=1) for rows in (bank, queries))
    parts = [
        torch.argsort(part @ bank.T, dim=1, descending=True, stable=True).cpu()
        for part in queries.split(max(1, _CELLS // max(1, len(bank))))
    ]
    order = torch.cat(parts).T
    return order if names is None else names[order]

"""Landmark retrieval on revisited Oxford and Paris, by the official protocol and as the papers of the DINO family do it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.data.layouts import revisited
from maskwise.evaluation import features, views
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError
from maskwise.functional.metrics import revisited_map

# official: the query is cut to its box, then at most 1024 pixels; papers: no cut, at most 224 (evaluation.md 0.4 and 8)
VARIANTS = {"official": (True, 1024), "papers": (False, 224)}
MULTI_SCALE = (1.0, 2**-0.5, 0.5)
_CELLS = 1 << 25


def retrieval(
    encoder, data: dict, world=None, *, variants: Sequence[str] = ("official", "papers"), long_side: int | None = None, multi_scale: bool = False,
    feature: str = "pooled", ks: Sequence[int] = (1, 5, 10), cache=None,
) -> Report:  # fmt: skip
    """Revisited mAP and mP@k of data["query"] against data["database"] -> Report, in per cent, every number named by its variant.

    data also holds "ground_truth": one {bbx, easy, hard, junk} a query. Images keep their aspect and go one at a time; the longer side
    is shrunk to at most long_side (1024 official, 224 papers), then cut to whole patches. multi_scale averages raw features at 1,
    2^-1/2 and 1/2. Similarity is cosine; equal ones rank by index. evaluation.md 8, attmask.md 5.10.
    """
    begin = time.perf_counter()
    variants = (variants,) if isinstance(variants, str) else tuple(variants)
    if not variants or any(name not in VARIANTS for name in variants):
        raise UserError(f"retrieval: variants {list(variants)}; choose from {', '.join(VARIANTS)}")
    lacking = [role for role in ("query", "database", "ground_truth") if role not in data]
    if lacking:
        raise UserError(f"retrieval has no {' and no '.join(lacking)}; give test=FOLDER that holds gnd_<name>.pkl and jpg/")
    patch = views.patch_of(encoder)
    looking = views.Scales(encoder, MULTI_SCALE, patch) if multi_scale else encoder
    boxes = tuple(tuple(truth["bbx"].tolist()) for truth in data["ground_truth"])
    numbers, images, corrupt, sizes, banks = {}, 0, {}, {}, {}
    for name in variants:
        cut, longest = VARIANTS[name]
        sizes[name] = longest = long_side or longest
        for role in ("database", "query"):
            view = views.Shrunk(longest, patch, boxes if cut and role == "query" else None)
            if (role, view) not in banks:
                banks[role, view] = features.extract(looking, data[role], feature, world=world, batch_size=1, view=view, cache=cache)
                images += len(banks[role, view])
                corrupt |= banks[role, view].corrupt
            if role == "database":
                bank = banks[role, view]
            else:
                queries = banks[role, view]
        ranks = ranking(bank[feature], queries[feature], bank.index, next(encoder.parameters()).device)
        truth = [data["ground_truth"][q] for q in queries.index.tolist()]
        for level, found in revisited_map(ranks, truth, ks).items():
            numbers[f"{name}_{level}_map"] = 100 * found["map"]
            numbers |= {f"{name}_{level}_mp{k}": 100 * value for k, value in zip(ks, found["mp"])}
    seconds = time.perf_counter() - begin
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "retrieval", "variants": {name: f"{'query cut to its box' if VARIANTS[name][0] else 'query not cut'}, longer side at most {sizes[name]}" for name in variants},
            "differences": [f"{name}: longer side at most {long_side} instead of {VARIANTS[name][1]}" for name in variants if long_side not in (None, VARIANTS[name][1])],
            "average_precision": "trapezoid, as revisited Oxford and Paris define it", "multi_scale": list(MULTI_SCALE) if multi_scale else None, "feature": feature,
            "queries": len(data["query"]), "database": len(data["database"]),
        },
        data_hash=hashlib.sha256("".join(features.fingerprint(data[role]) for role in ("query", "database")).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": str(next(encoder.parameters()).device)},
        corrupt=corrupt,
    )  # fmt: skip


retrieval.needs = ()
retrieval.readers = {"test": revisited.read}


def ranking(bank: Tensor, queries: Tensor, names: Tensor | None = None, device=None) -> Tensor:
    """Database indices by falling cosine: [n, D], [Q, D] -> int64 [n, Q]; ties by lowest index; names [n] replace row numbers."""
    device = torch.device(device) if device is not None else bank.device
    bank, queries = (F.normalize(rows.float().to(device), dim=1) for rows in (bank, queries))
    parts = [torch.argsort(part @ bank.T, dim=1, descending=True, stable=True).cpu() for part in queries.split(max(1, _CELLS // max(1, len(bank))))]
    order = torch.cat(parts).T
    return order if names is None else names[order]

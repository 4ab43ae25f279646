"""Recall@k of metric learning: CUB, Cars, Stanford Online Products, In-Shop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from maskwise.bounds import Count
from maskwise.data.benchmark_sets import cars, cub, inshop, products
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.views import Bilinear
from maskwise.evaluation.protocol import Options, as_tuple, labeled_sets
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional.metrics import recall_at_k

PRESETS = {"cub": (1, 2, 4), "cars": (1, 2, 4), "products": (1, 10, 100), "inshop": (1, 10, 20)}
SETS = {"cub": cub, "cars": cars, "products": products, "inshop": inshop}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallOptions(Options):
    """Options of Recall@k.

    preset: cub or cars (k 1, 2, 4), products (1, 10, 100), inshop (1, 10, 20), or give ks.
    """

    evaluation = "recall"

    preset: str | None = None
    ks: Count | Sequence[Count] = ()
    feature: str = "pooled"
    batch_size: Count = 256
    cache: object = None


def recall(encoder, data: dict, world=None, **options) -> Report:
    """Compute Recall@k of data["test"] by cosine similarity -> Report, in per cent.

    options: those of `RecallOptions`. Recall@k: share of images with an image of their class among the k nearest. The
    queries are searched among data["gallery"] if given (In-Shop), else among themselves without the query. Short side
    to 256 by bilinear interpolation, center 224 (in proportion for other sizes).
    """
    begin, chosen = time.perf_counter(), RecallOptions(**options)
    preset, feature, ks = chosen.preset or data.get("preset"), chosen.feature, chosen.ks
    ks = as_tuple(ks) or PRESETS.get(preset or "cub")
    if not ks:
        raise UserError(f"recall: no preset {chosen.preset!r}; give {', '.join(PRESETS)}, or ks")
    data = labeled_sets("recall", data, *(["gallery"] if "gallery" in data else []), "test")
    shared = {"world": world, "batch_size": chosen.batch_size, "cache": chosen.cache}
    shared["view"] = Bilinear(tuple(encoder.image_size))
    roles = [role for role in ("test", "gallery") if role in data]
    banks = {role: extract.extract(encoder, data[role], feature, **shared) for role in roles}
    device = next(encoder.parameters()).device
    rows = {role: (bank[feature].to(device), bank.labels) for role, bank in banks.items()}
    scores = recall_at_k(*rows["test"], ks, gallery=rows.get("gallery"))
    return Report(
        numbers={f"recall_{k}": value for k, value in scores.items()},
        protocol={
            "evaluation": "recall",
            "preset": preset,
            "split": data.get("split", "the test images given"),
            "feature": feature,
            "queries": len(banks["test"]),
            "gallery": len(banks["gallery"]) if "gallery" in banks else "the queries without the query itself",
            "similarity": "cosine",
            "resize": "bilinear",
        },
        data_hash=joint_hash(*(bank.hash for bank in banks.values())),
        cost=cost(begin, sum(map(len, banks.values())), device),
        corrupt={name: reason for bank in banks.values() for name, reason in bank.corrupt.items()},
    )


def read(folder) -> dict:
    """Read the one of the four datasets that a folder holds, with preset and split; {} if it holds none."""
    splits = {
        "cub": "classes 101-200",
        "cars": "classes 99-196",
        "products": "Ebay_test.txt",
        "inshop": "query against gallery",
    }
    for name, layout in SETS.items():
        if layout.matches(folder):
            return {
                **layout.read(folder),
                "preset": name,
                "split": f"{name}: {splits[name]}, the standard metric-learning split",
            }
    return {}

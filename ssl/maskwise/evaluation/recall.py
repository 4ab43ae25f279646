"""Recall@k: is one of the nearest images of the same class, bird, car, product or garment."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from maskwise.data.layouts import cars, cub, inshop, products
from maskwise.evaluation import features
from maskwise.evaluation.report import Report
from maskwise.evaluation.views import Bilinear
from maskwise.functional.errors import UserError
from maskwise.functional.metrics import recall_at_k

PRESETS = {"cub": (1, 2, 4), "cars": (1, 2, 4), "products": (1, 10, 100), "inshop": (1, 10, 20)}
SETS = {"cub": cub, "cars": cars, "products": products, "inshop": inshop}


def recall(
    encoder, data: dict, world=None, *, preset: str | None = None, ks: Sequence[int] = (), feature: str = "pooled", batch_size: int = 256, cache=None
) -> Report:
    """Share of data["test"] with one of its class among the k nearest by cosine, itself left out by index -> Report, in per cent.

    data["gallery"], where there is one (In-Shop), is what is searched. preset: cub or cars (k 1, 2, 4), products (1, 10, 100), inshop
    (1, 10, 20), or give ks. Short side to 256 by bilinear interpolation, centre 224 (in proportion for other sizes). evaluation.md 9.
    """
    begin = time.perf_counter()
    wanted = (ks,) if isinstance(ks, int) else tuple(ks) or PRESETS.get(preset or data.get("preset", "cub"))
    if not wanted or any(k < 1 for k in wanted):
        raise UserError(f"recall: preset {preset!r} with ks {list(ks)}; give {', '.join(PRESETS)}, or k from 1")
    for role in ("test", *(["gallery"] if "gallery" in data else [])):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"recall: the {role} images have no labels; give a folder with one subfolder per class, or one of {', '.join(PRESETS)}")
    options = {"world": world, "batch_size": batch_size, "cache": cache, "view": Bilinear(tuple(encoder.image_size))}
    banks = {role: features.extract(encoder, data[role], feature, **options) for role in ("test", "gallery") if role in data}
    device = next(encoder.parameters()).device
    rows = {role: (bank[feature].to(device), bank.labels) for role, bank in banks.items()}
    found = recall_at_k(*rows["test"], wanted, gallery=rows.get("gallery"))
    seconds, images = time.perf_counter() - begin, sum(map(len, banks.values()))
    return Report(
        numbers={f"recall_{k}": value for k, value in found.items()},
        protocol={
            "evaluation": "recall", "preset": preset or data.get("preset"), "split": data.get("split", "the test images given"), "feature": feature, "queries": len(banks["test"]),
            "gallery": len(banks["gallery"]) if "gallery" in banks else "the queries themselves, each without itself", "similarity": "cosine", "resize": "bilinear",
        },
        data_hash=hashlib.sha256("".join(bank.hash for bank in banks.values()).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": str(device)},
        corrupt={name: reason for bank in banks.values() for name, reason in bank.corrupt.items()},
    )  # fmt: skip


def read(folder) -> dict:
    """Whichever of the four sets a folder holds, with the ks and the split of its tables; {} where it holds none."""
    splits = {"cub": "classes 101-200", "cars": "classes 99-196", "products": "Ebay_test.txt", "inshop": "query against gallery"}
    for name, layout in SETS.items():
        if layout.holds(folder):
            return {**layout.read(folder), "preset": name, "split": f"{name}: {splits[name]}, the standard metric-learning split"}
    return {}


recall.needs = ("test",)
recall.readers = {"test": read}

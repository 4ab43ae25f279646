"""Copy detection on Copydays: does a damaged copy find the photograph it was made of."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from maskwise.data.layouts import copydays
from maskwise.evaluation import features
from maskwise.evaluation.report import Report
from maskwise.evaluation.retrieval import ranking
from maskwise.evaluation.views import Square
from maskwise.functional.errors import UserError
from maskwise.functional.metrics import average_precision

TOP = 20  # neighbours that count
GEM_POWER, GEM_FLOOR = 4.0, 1e-6


def copy_detection(
    encoder, data: dict, world=None, *, size: int | None = None, whitening: bool | None = None, top: int = TOP, batch_size: int = 64
) -> Report:
    """mAP of each group of copies in data["copies"] against data["database"] (and data["distractors"]) -> Report, in per cent.

    Images are squeezed into size x size (default: the encoder's; published 320 for DINO, 224 for iBOT). The feature is the pooled
    vector beside the generalised mean (power 4) of the patch tokens. whitening: by the covariance of data["whitening"] (default:
    where it is given). One original is right for each copy; beyond the first `top` it counts as missed. attmask.md 5.10.
    """
    begin = time.perf_counter()
    if "database" not in data or not data.get("copies"):
        raise UserError("copy detection has no originals or no copies; give test=FOLDER that holds original/ and strong/")
    whiten = "whitening" in data if whitening is None else whitening
    if whiten and "whitening" not in data:
        raise UserError("copy detection: whitening needs images of its own; give whitening=FOLDER, or whitening=false")
    view = Square(size or max(encoder.image_size))
    corrupt: dict[str, str] = {}
    device = next(encoder.parameters()).device

    def described(dataset) -> tuple[Tensor, Tensor]:
        return descriptors(encoder, dataset, view, corrupt, world=world, batch_size=batch_size)

    bank, names = described(data["database"])
    labels, images = data["database"].labels[names], len(bank)
    if "distractors" in data:
        others, _ = described(data["distractors"])
        bank, labels, images = torch.cat([bank, others]), torch.cat([labels, torch.full((len(others),), -1)]), images + len(others)
    mean, turn = (whitener(described(data["whitening"])[0]) if whiten else (torch.zeros(1), None))
    numbers = {}
    for group, copies in data["copies"].items():
        queries, place = described(copies)
        images += len(queries)
        sides = [rows if turn is None else (rows - mean) @ turn for rows in (bank, queries)]
        ranks = ranking(*sides, device=device)[:top]
        scores = [average_precision(ranks[:, q], (labels == label).nonzero().flatten(), torch.zeros(0))[0] for q, label in enumerate(copies.labels[place])]
        numbers[f"{group}_map"] = 100 * float(torch.tensor(scores).nanmean())
    seconds = time.perf_counter() - begin
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "copy_detection", "size": view.size, "feature": f"pooled beside GeM of patches (power {GEM_POWER:g})", "whitening": whiten, "top": top, "preset": "dino",
            "differences": [
                *([] if view.size in (224, 320) else [f"{view.size} pixels instead of 320 (DINO) or 224 (iBOT)"]), *([] if whiten else ["no whitening"]),
                *([] if "distractors" in data else ["no distractors"]),
            ],
            "database": len(bank), "distractors": len(data["distractors"]) if "distractors" in data else 0, "copies": {name: len(found) for name, found in data["copies"].items()},
        },
        data_hash=features.fingerprint(data["database"]),
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": str(device)},
        corrupt=corrupt,
    )  # fmt: skip


copy_detection.needs = ()
copy_detection.readers = {"test": copydays.read}


def descriptors(encoder, dataset, view, corrupt: dict, *, world=None, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Pooled vectors beside GeM patch tokens: [n, 2 D] in the dataset's order, and index int64 [n]."""
    rows = torch.arange(len(dataset))
    if world is not None and world.size > 1:
        rows = rows[rows // batch_size % world.size == world.rank]
    found, index = [torch.zeros(0, 2 * encoder.dim)], [torch.zeros(0, dtype=torch.int64)]
    for numbers, _, seen in features.stream(encoder, dataset, rows=rows, view=view, batch_size=batch_size, corrupt=corrupt):
        found.append(torch.cat([seen.pooled.float(), gem(seen.patches)], dim=1).cpu())
        index.append(numbers)
    found, index = torch.cat(found), torch.cat(index)
    if world is not None and world.size > 1:
        found, index = world.gather(found), world.gather(index)
        for some in world.gather_objects(dict(corrupt)):
            corrupt |= some
    if not len(index):
        raise UserError(f"none of the {len(dataset)} images can be read; give images")
    order = torch.argsort(index)
    return found[order], index[order]


def gem(patches: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised mean over patches, what is below 1e-6 taken as that: [B, N, D] -> float32 [B, D] (attmask.md 5.10)."""
    return patches.float().clamp(min=GEM_FLOOR).pow(power).mean(dim=1).pow(1 / power)


def whitener(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and the map [D, r] that makes the covariance of [n, D] the identity; directions without variance are left out."""
    rows = rows.double()
    mean = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / max(1, len(rows)))
    kept = values > values[-1] * 1e-8
    return mean.float(), (vectors[:, kept] * values[kept].rsqrt()).float()

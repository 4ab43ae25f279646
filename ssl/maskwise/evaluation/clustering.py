"""Unsupervised clustering: how well groups found without labels agree with the classes."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.evaluation import features
from maskwise.evaluation.metrics import cluster_scores
from maskwise.evaluation.report import Report
from maskwise.functional import draws
from maskwise.functional.errors import UserError

_CELLS = 1 << 25  # distances at a time


def clustering(
    encoder, data: dict, world=None, *, head=None, clusters: int | None = None, feature: str = "pooled", restarts: int = 5, iterations: int = 100,
    batch_size: int = 256, seed: int = 0, cache=None,
) -> Report:  # fmt: skip
    """NMI, ARI, Fowlkes-Mallows and matched accuracy of clusters of data["test"] -> Report, in per cent.

    head: the teacher's projection head; each image goes to its largest logit, as published (with about as many prototypes as
    classes). Without one, spherical k-means into `clusters` groups (default: the number of classes), the best of `restarts`.
    attmask.md 5.8. Raises UserError for images without labels.
    """
    begin = time.perf_counter()
    test = data.get("test")
    if test is None or test.labels is None:
        raise UserError("clustering needs labelled test images to be measured against; give test=FOLDER with one subfolder per class")
    bank = features.extract(encoder, test, feature, world=world, batch_size=batch_size, cache=cache)
    device = next(encoder.parameters()).device
    classes = len(bank.labels.unique())
    rows = bank[feature].float()
    if head is not None:
        with torch.no_grad(), features.evaluating(head.to(device)):
            found = torch.cat([head(part.to(device)).argmax(dim=1).cpu() for part in rows.split(4096)])
        about = {"preset": "ibot", "differences": [], "clusters": "largest logit of the head", "prototypes": int(head(rows[:1].to(device)).shape[1])}
    else:
        count = clusters or classes
        if not 1 <= count <= len(rows):
            raise UserError(f"clustering into {count} groups of {len(rows)} images is not possible; give clusters from 1 to {len(rows)}")
        found, inertia = kmeans(F.normalize(rows, dim=1).to(device), count, restarts=restarts, iterations=iterations, seed=seed)
        found = found.cpu()
        about = {
            "preset": "ibot", "differences": ["k-means of features instead of the head's largest logit"], "clusters": "k-means of L2-normalised features",
            "k": count, "restarts": restarts, "iterations": iterations, "inertia": inertia,
        }  # fmt: skip
    seconds = time.perf_counter() - begin
    return Report(
        numbers={**cluster_scores(found, bank.labels), "clusters_used": float(len(found.unique()))},
        protocol={"evaluation": "clustering", **about, "feature": feature, "images": len(rows), "classes": classes, "matching": "Hungarian"},
        data_hash=bank.hash,
        cost={"seconds": round(seconds, 3), "images": len(rows), "images_per_second": round(len(rows) / seconds, 1), "device": str(device)},
        corrupt=bank.corrupt,
        seeds={} if head is not None else {"k-means": seed},
    )


clustering.needs = ("test",)


def kmeans(rows: Tensor, clusters: int, *, restarts: int = 5, iterations: int = 100, seed: int = 0, start: Tensor | None = None) -> tuple[Tensor, float]:
    """Lloyd's algorithm from k-means++ starts, the best of several: [n, D] -> (cluster int64 [n], sum of squared distances).

    Draws are keyed by the seed; a group that loses its last member takes the row farthest from its own centre. start: [k, D] centres
    to begin at, instead of drawing.
    """
    best: tuple[Tensor, float] | None = None
    for attempt in range(1 if start is not None else restarts):
        centres = plus_plus(rows, clusters, draws.mix(draws.ORDER, seed, attempt)) if start is None else start.to(rows)
        group, distance = assign(rows, centres)
        for _ in range(iterations):
            counts = torch.bincount(group, minlength=clusters)
            for empty in (counts == 0).nonzero().flatten().tolist():
                far = int(distance.argmax())
                group[far], distance[far] = empty, 0.0
                counts = torch.bincount(group, minlength=clusters)
            centres = torch.zeros_like(centres).index_add_(0, group, rows) / counts.clamp(min=1)[:, None]
            moved, distance = assign(rows, centres)
            if torch.equal(moved, group):
                break
            group = moved
        total = float(distance.double().sum())
        if best is None or total < best[1]:
            best = group, total
    return best


def plus_plus(rows: Tensor, clusters: int, key: Tensor) -> Tensor:
    """Starting centres [k, D], each a row drawn with a chance in proportion to its squared distance from those before."""
    noise = draws.uniform(key, clusters).flatten().tolist()
    chosen = [min(len(rows) - 1, int(noise[0] * len(rows)))]
    nearest = (rows - rows[chosen[0]]).square().sum(dim=1)
    for u in noise[1:]:
        mass = nearest.double().cumsum(0)
        chosen.append(min(len(rows) - 1, int(torch.searchsorted(mass, mass[-1:] * u, right=True))))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(dim=1))
    return rows[chosen]


def assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row: [n, D], [k, D] -> (int64 [n], squared distance [n])."""
    size = centres.square().sum(dim=1)
    parts = [(size - 2 * part @ centres.T).min(dim=1) for part in rows.split(max(1, _CELLS // len(centres)))]
    distance = torch.cat([part.values for part in parts]) + rows.square().sum(dim=1)
    return torch.cat([part.indices for part in parts]), distance.clamp(min=0)

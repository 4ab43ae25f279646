"""Unsupervised clustering: agreement of clusters with classes."""

from __future__ import annotations

import dataclasses
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.protocol import Options, labeled_sets
from maskwise.evaluation.report import Report, cost
from maskwise.evaluation.scoring.library_metrics import cluster_scores
from maskwise.functional import keyed_random
from maskwise.process.progress import counted

_CELLS = 1 << 25  # distances at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusteringOptions(Options):
    """Options of clustering.

    head: the teacher's projection head; without one, spherical k-means into `clusters` groups (default: the number of
    classes), the best of `restarts`.
    """

    evaluation = "clustering"

    head: object = None
    clusters: Count | None = None
    feature: str = "pooled"
    restarts: Count = 5
    iterations: Count = 100
    batch_size: Count = 256
    seed: int = 0
    cache: object = None


def clustering(encoder, data: dict, world=None, **options) -> Report:
    """Compute NMI, ARI, Fowlkes-Mallows and matched accuracy of clusters of data["test"] -> Report, in per cent.

    options: those of `ClusteringOptions`. With a head, each image goes to its largest logit, as published (with about
    as many prototypes as classes). Raises UserError for images without labels.
    """
    begin, chosen = time.perf_counter(), ClusteringOptions(**options)
    data = labeled_sets("clustering", data, "test")
    shared = {"world": world, "batch_size": chosen.batch_size, "cache": chosen.cache}
    bank = extract.extract(encoder, data["test"], chosen.feature, **shared)
    device, rows = next(encoder.parameters()).device, bank[chosen.feature].float()
    classes = len(bank.labels.unique())
    if chosen.head is not None:
        groups, about = head_clusters(rows, chosen.head.to(device), device)
    else:
        groups, about = kmeans_clusters(rows, chosen.clusters or classes, chosen, device)
    return Report(
        numbers={**cluster_scores(groups, bank.labels), "clusters_used": float(len(groups.unique()))},
        protocol={
            "evaluation": "clustering",
            "preset": "ibot",
            **about,
            "feature": chosen.feature,
            "images": len(rows),
            "classes": classes,
            "matching": "Hungarian",
        },
        data_hash=bank.hash,
        cost=cost(begin, len(rows), device),
        corrupt=bank.corrupt,
        seeds={} if chosen.head is not None else {"k-means": chosen.seed},
    )


def head_clusters(rows: Tensor, head, device) -> tuple[Tensor, dict]:
    """Assign rows [n, D] to the largest logit of a head -> (cluster int64 [n], protocol entries)."""
    with torch.no_grad(), extract.evaluating(head):
        groups = torch.cat([head(part.to(device)).argmax(dim=1).cpu() for part in rows.split(4096)])
    prototypes = int(head(rows[:1].to(device)).shape[1])
    return groups, {"differences": [], "clusters": "largest logit of the head", "prototypes": prototypes}


def kmeans_clusters(rows: Tensor, count: int, chosen: ClusteringOptions, device) -> tuple[Tensor, dict]:
    """Cluster L2-normalized rows [n, D] by k-means -> (cluster int64 [n], protocol entries). Raises UserError."""
    if not 1 <= count <= len(rows):
        raise UserError(
            f"clustering into {count} groups of {len(rows)} images is not possible; give clusters from 1 to {len(rows)}"
        )
    settings = {"restarts": chosen.restarts, "iterations": chosen.iterations}
    groups, inertia = kmeans(F.normalize(rows, dim=1).to(device), count, seed=chosen.seed, **settings)
    return groups.cpu(), {
        "differences": ["k-means of features instead of the head's largest logit"],
        "clusters": "k-means of L2-normalized features",
        "k": count,
        **settings,
        "inertia": inertia,
    }


def kmeans(
    rows: Tensor, clusters: int, *, restarts: int = 5, iterations: int = 100, seed: int = 0, start: Tensor | None = None
) -> tuple[Tensor, float]:
    """Run Lloyd's algorithm from k-means++ starts: [n, D] -> (cluster int64 [n], sum of squared distances) of the best.

    Random numbers are keyed by the seed; an empty group takes the row farthest from its own center. start: [k, D]
    initial centers instead of random ones.
    """
    best: tuple[Tensor, float] | None = None
    restarts = 1 if start is not None else restarts
    for attempt in counted(range(restarts), restarts, "restarts", "restart"):
        if start is None:
            centers = plus_plus(rows, clusters, keyed_random.make_key(keyed_random.ORDER, seed, attempt))
        else:
            centers = start.to(rows)
        group, distance = assign(rows, centers)
        for _ in range(iterations):
            counts = torch.bincount(group, minlength=clusters)
            for empty in (counts == 0).nonzero().flatten().tolist():
                far = int(distance.argmax())
                group[far], distance[far] = empty, 0.0
                counts = torch.bincount(group, minlength=clusters)
            centers = torch.zeros_like(centers).index_add_(0, group, rows) / counts.clamp(min=1)[:, None]
            moved, distance = assign(rows, centers)
            if torch.equal(moved, group):
                break
            group = moved
        total = float(distance.double().sum())
        if best is None or total < best[1]:
            best = group, total
    return best


def plus_plus(rows: Tensor, clusters: int, key: Tensor) -> Tensor:
    """Draw k-means++ centers [k, D]: rows with probability proportional to the squared distance to earlier ones."""
    noise = keyed_random.uniform(key, clusters).flatten().tolist()
    chosen = [min(len(rows) - 1, int(noise[0] * len(rows)))]
    nearest = (rows - rows[chosen[0]]).square().sum(dim=1)
    for u in noise[1:]:
        mass = nearest.double().cumsum(0)
        chosen.append(min(len(rows) - 1, int(torch.searchsorted(mass, mass[-1:] * u, right=True))))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(dim=1))
    return rows[chosen]


def assign(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest center of each row: [n, D], [k, D] -> (int64 [n], squared distance [n])."""
    size = centers.square().sum(dim=1)
    parts = [(size - 2 * part @ centers.T).min(dim=1) for part in rows.split(max(1, _CELLS // len(centers)))]
    distance = torch.cat([part.values for part in parts]) + rows.square().sum(dim=1)
    return torch.cat([part.indices for part in parts]), distance.clamp(min=0)

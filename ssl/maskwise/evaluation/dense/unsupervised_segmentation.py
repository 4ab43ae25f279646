"""Unsupervised segmentation: clusters of patches, matched with classes by the Hungarian method."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.bounds import Count, NonNegativeInt
from maskwise.data.benchmark_sets.label_maps import IGNORED
from maskwise.errors import UserError
from maskwise.evaluation.clustering import assign, kmeans
from maskwise.evaluation.dense.knn_segmentation import whole_images
from maskwise.evaluation.dense.label_sets import iou_of_classes, numbers_of, scored_classes
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.probes.gradient_sync import gather_all
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost
from maskwise.functional import keyed_random
from maskwise.imaging.drawing import enlarge

STREAM = 48  # of keyed random numbers: the patches of an image that k-means sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnsupervisedSegmentationOptions(Options):
    """Options of unsupervised segmentation.

    clusters: default: the number of classes; patches: at most for k-means, as many of each image; restarts: of k-means,
    of which the best counts; size: short side of the images (default: the encoder's image size); ignored: labels that
    are left out.
    """

    evaluation = "unsupervised_segmentation"

    clusters: Count | None = None
    patches: Count = 50_000
    restarts: Count = 5
    iterations: Count = 100
    size: Count | None = None
    ignored: NonNegativeInt | Sequence[NonNegativeInt] | None = None
    seed: int = 0


def unsupervised_segmentation(encoder, data: dict, world=None, **options) -> Report:
    """Cluster patches of data["test"] and match clusters with classes -> Report, in per cent.

    options: those of `UnsupervisedSegmentationOptions`. k-means of L2-normalized patch tokens; the one-to-one
    assignment has the most right pixels (Hungarian), so that it uses the test labels. Ranks share the images. Raises
    UserError for sets without label maps, without SciPy, and for fewer patches than clusters.
    """
    begin, chosen = time.perf_counter(), UnsupervisedSegmentationOptions(**options)
    dataset = data.get("test")
    classes = scored_classes("unsupervised_segmentation", data, ("test",), chosen.ignored)
    device, corrupt = next(encoder.parameters()).device, {}
    size, clusters = chosen.size or min(encoder.image_size), chosen.clusters or len(classes)
    most = max(1, -(-chosen.patches // max(1, len(dataset))))
    parts = []
    for index, patches, _ in whole_images(encoder, dataset, size, world, corrupt):
        noise = keyed_random.uniform(keyed_random.make_key(STREAM, chosen.seed, index), len(patches))
        parts.append(F.normalize(patches, dim=1)[noise.argsort()[:most].to(device)])
    rows = torch.cat(parts) if parts else torch.zeros(0, getattr(encoder, "patch_dim", encoder.dim), device=device)
    rows = rows if world is None else world.gather(rows)
    if len(rows) < clusters:
        raise UserError(
            f"unsupervised_segmentation: {len(rows)} patches for {clusters} clusters; give more images, or "
            "fewer clusters"
        )
    groups, inertia = kmeans(rows, clusters, restarts=chosen.restarts, iterations=chosen.iterations, seed=chosen.seed)
    centers = torch.stack([rows[groups == i].mean(dim=0) for i in range(clusters) if (groups == i).any()])
    counts = torch.zeros(len(classes), len(centers), dtype=torch.int64)
    for index, patches, grid in whole_images(encoder, dataset, size, world, corrupt):
        group = assign(F.normalize(patches, dim=1), centers)[0].reshape(grid).cpu()
        truth = classes.index(dataset.label_map(index))
        inside = truth != IGNORED
        large = torch.from_numpy(enlarge(group.numpy(), tuple(truth.shape)))
        cells = truth[inside] * len(centers) + large[inside]
        counts += torch.bincount(cells, minlength=counts.numel()).reshape(counts.shape)
    counts = counts if world is None else world.all_sum(counts.to(device)).cpu()
    if not int(counts.sum()):
        raise UserError("unsupervised_segmentation: no test image has a labeled pixel and can be read; give others")
    table = matched(counts)
    return Report(
        numbers=numbers_of(table),
        protocol={
            "evaluation": "unsupervised_segmentation",
            "clusters": len(centers),
            "matching": "Hungarian, on all labeled test pixels",
            "patches": len(rows),
            "restarts": chosen.restarts,
            "iterations": chosen.iterations,
            "inertia": inertia,
            "size": size,
            "seed": chosen.seed,
            "classes": len(classes),
            "ignored": chosen.ignored,
            "test": len(dataset),
            "iou": iou_of_classes(table, classes),
        },
        data_hash=fingerprint(dataset),
        cost=cost(begin, 2 * len(dataset), device),
        corrupt=gather_all(corrupt, world),
        seeds={"k-means": chosen.seed},
    )


def matched(counts: Tensor) -> Tensor:
    """Order clusters by their classes: pixels by true class and cluster int64 [C, K] -> confusion matrix [C, C + 1].

    The one-to-one assignment has the most right pixels; clusters without a class are summed in the last column, and a
    class without a cluster has a column of zeros. Raises UserError without SciPy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("matching clusters needs SciPy: pip install 'maskwise[eval]'") from None
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    table = counts.new_zeros(len(counts), len(counts) + 1)
    table[:, rows] = counts[:, columns]
    table[:, -1] = counts.sum(dim=1) - table.sum(dim=1)
    return table

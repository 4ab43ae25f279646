"""k-NN segmentation: classes of patches by the votes of labeled patches; nothing is trained."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maskwise.bounds import Count, NonNegativeInt, Positive
from maskwise.data.benchmark_sets.label_maps import IGNORED
from maskwise.errors import UserError
from maskwise.evaluation.dense.label_sets import count_pixels, iou_of_classes, largest_class, numbers_of, scored_classes
from maskwise.evaluation.dense.patch_maps import Whole, patch_classes
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.features.views import patch_of
from maskwise.evaluation.knn import nearest, votes
from maskwise.evaluation.probes.gradient_sync import gather_all
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional import keyed_random

STREAM = 47  # of keyed random numbers: the patches of an image that enter the bank


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNNSegmentationOptions(Options):
    """Options of k-NN segmentation.

    bank: labeled patches at most, as many of each training image; size: short side of the images (default: the
    encoder's image size); ignored: labels that are left out.
    """

    evaluation = "knn_segmentation"

    k: Count = 20
    temperature: Positive = 0.07
    bank: Count = 100_000
    size: Count | None = None
    ignored: NonNegativeInt | Sequence[NonNegativeInt] | None = None
    seed: int = 0


def knn_segmentation(encoder, data: dict, world=None, **options) -> Report:
    """Label patches of data["test"] by votes of patches of data["train"], as k-NN does -> Report, in per cent.

    options: those of `KNNSegmentationOptions`. Numbers: mean IoU, mean accuracy and pixel accuracy of one confusion
    matrix over all test pixels, at the original sizes; protocol.iou has the IoU of each class.
    Ranks share the images. Raises UserError for sets without label maps.
    """
    begin, chosen = time.perf_counter(), KNNSegmentationOptions(**options)
    classes = scored_classes("knn_segmentation", data, ("train", "test"), chosen.ignored)
    device, corrupt = next(encoder.parameters()).device, {}
    size = chosen.size or min(encoder.image_size)
    bank, labels = patch_bank(encoder, data["train"], classes, size, chosen, world, corrupt)
    k, table = min(chosen.k, len(bank)), torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for index, patches, grid in whole_images(encoder, data["test"], size, world, corrupt):
        scores = patch_scores(bank, labels, patches, k, len(classes), chosen.temperature)
        truth = classes.index(data["test"].label_map(index))
        table += count_pixels(largest_class(scores.T.unflatten(1, grid), tuple(truth.shape)), truth, len(classes))
    table = table if world is None else world.all_sum(table.to(device)).cpu()
    if not int(table.sum()):
        raise UserError("knn_segmentation: no test image has a labeled pixel and can be read; give others")
    return Report(
        numbers=numbers_of(table),
        protocol={
            "evaluation": "knn_segmentation",
            "k": k,
            "temperature": chosen.temperature,
            "bank": len(bank),
            "size": size,
            "seed": chosen.seed,
            "classes": len(classes),
            "ignored": chosen.ignored,
            "train": len(data["train"]),
            "test": len(data["test"]),
            "iou": iou_of_classes(table, classes),
        },
        data_hash=joint_hash(*(fingerprint(data[role]) for role in ("train", "test"))),
        cost=cost(begin, len(data["train"]) + len(data["test"]), device),
        corrupt=gather_all(corrupt, world),
        seeds={"bank": chosen.seed},
    )


def whole_images(encoder, dataset, size: int, world, corrupt: dict) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
    """Yield (index, normalized patch tokens float32 [N, D], grid) of this rank's images, with their aspect."""
    rank, count = (0, 1) if world is None else (world.rank, world.size)
    rows, view = torch.arange(rank, len(dataset), count), Whole(size, patch_of(encoder))
    for index, _, features in extract.stream(encoder, dataset, rows=rows, view=view, batch_size=1, corrupt=corrupt):
        yield int(index), features.patches[0].float(), features.grid


def patch_bank(encoder, dataset, classes, size: int, chosen, world, corrupt: dict) -> tuple[Tensor, Tensor]:
    """Return labeled patches [n, D] on the encoder's device and their classes int64 [n], of all ranks.

    A patch has its most frequent class; patches that are unlabeled at least by half are left out.
    """
    most = max(1, -(-chosen.bank // max(1, len(dataset))))
    rows, labels = [], []
    for index, patches, grid in whole_images(encoder, dataset, size, world, corrupt):
        truth = patch_classes(classes.index(dataset.label_map(index)), grid, patch_of(encoder), len(classes), IGNORED)
        noise = keyed_random.uniform(keyed_random.make_key(STREAM, chosen.seed, index), len(truth))
        noise[truth == IGNORED] = 2.0
        keep = noise.argsort()[: min(most, int((truth != IGNORED).sum()))].to(patches.device)
        rows.append(patches[keep])
        labels.append(truth[keep.cpu()])
    device = next(encoder.parameters()).device
    bank = torch.cat(rows) if rows else torch.zeros(0, getattr(encoder, "patch_dim", encoder.dim), device=device)
    known = (torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)).to(device)
    if world is not None:
        bank, known = world.gather(bank), world.gather(known)
    if not len(bank):
        raise UserError("knn_segmentation: no training image has a labeled patch and can be read; give others")
    return bank, known


def patch_scores(bank: Tensor, labels: Tensor, patches: Tensor, k: int, classes: int, temperature: float) -> Tensor:
    """Return the shares of votes that patches give the classes: bank [n, D], int64 [n], [N, D] -> float64 [N, C]."""
    similarity, index = nearest(bank, patches, k)
    scores = votes(similarity, labels[index], classes, temperature)
    return scores / scores.sum(dim=1, keepdim=True)

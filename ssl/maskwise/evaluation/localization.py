"""Object localization by attention maps: MaxBoxAccV2 and MaxBoxAcc."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from maskwise.bounds import Count, NonNegativeInt
from maskwise.data.benchmark_sets import boxed
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, views
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost
from maskwise.functional.attention import patch_attention
from maskwise.functional.metrics import BOX_IOUS, LEVELS, SCORE_SIZE, best_levels, level_boxes, level_hits

SERIES = ("v2", "v1", "center")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalizationOptions(Options):
    """Options of localization.

    head: the attention of one head, counted from 0, instead of the mean over heads; size: side of the square that
    images are resized to (boxes are compared at 224 pixels whatever it is).
    """

    evaluation = "localization"

    head: NonNegativeInt | None = None
    size: Count = SCORE_SIZE
    batch_size: Count = 64


def localization(encoder, data: dict, world=None, **options) -> Report:
    """Compute MaxBoxAccV2 of the attention on data["test"] (Choe et al. 2020) -> Report, in per cent.

    data["test"]: images with `.boxes(i)` or `.box(i)`. options: those of `LocalizationOptions`. The published threshold
    is the best one on the test images; data["fullsup"] adds numbers at the threshold that is best on those images.
    `center_...` are numbers of a map that falls from the center, the same for all images. Raises UserError for an
    encoder without attention and images without boxes.
    """
    begin, chosen = time.perf_counter(), LocalizationOptions(**options)
    device, corrupt = next(encoder.parameters()).device, {}
    accuracy, images = box_accuracy(encoder, data["test"], world, chosen, corrupt)
    numbers = named(accuracy)
    if "fullsup" in data:
        guide, more = box_accuracy(encoder, data["fullsup"], world, chosen, corrupt)
        images += more
        at_guide = named(accuracy, {series: table.argmax(dim=0) for series, table in guide.items()})
        numbers |= {f"{name}_fullsup": value for name, value in at_guide.items()}
    other_size = [f"images of {chosen.size} pixels instead of {SCORE_SIZE}"] if chosen.size != SCORE_SIZE else []
    one_head = [] if chosen.head is None else [f"the attention of head {chosen.head} instead of the mean over heads"]
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "localization",
            "metric": "max_box_acc_v2: all contours, mean over IoU .3 .5 .7; max_box_acc: largest contour, IoU .5",
            "threshold": "best on the test images, for each IoU; _fullsup: best on the images of fullsup",
            "head": "mean" if chosen.head is None else chosen.head,
            "size": chosen.size,
            "differences": [*other_size, *one_head],
            "images": len(data["test"]),
        },
        data_hash=fingerprint(data["test"]),
        cost=cost(begin, images, device),
        corrupt=corrupt,
    )


def box_accuracy(
    encoder, dataset, world, chosen: LocalizationOptions, corrupt: dict[str, str]
) -> tuple[dict[str, Tensor], int]:
    """Return {series: accuracy in per cent, float64 [255 levels, 3 IoUs]} over all ranks, and the number of images."""
    if not boxed.has_boxes(dataset):
        raise UserError(
            "localization needs images with boxes; give test=FOLDER in the layout of CUB, ImageNet (with "
            "Annotations/CLS-LOC), VOC, COCO or the lists of wsolevaluation"
        )
    counts = {series: torch.zeros(LEVELS, len(BOX_IOUS), dtype=torch.float64) for series in SERIES}
    images = torch.zeros(1, dtype=torch.float64)
    center, view = level_boxes(center_map(), 2), views.Stretched(chosen.size)
    for index, _, features in extract.stream(
        encoder,
        dataset,
        rows=extract.rank_share(len(dataset), world, chosen.batch_size),
        view=view,
        batch_size=chosen.batch_size,
        corrupt=corrupt,
        attention=True,
    ):
        for i, score_map in zip(index.tolist(), score_maps(encoder, features, chosen.head)):
            truth = scaled_boxes(dataset, i, view.sizes.pop(i))
            for series, found in zip(SERIES, [*level_boxes(score_map, 2, 1), *center]):
                counts[series] += level_hits(*found, truth)
        images += len(index)
    if world is not None:
        images = world.all_sum(images)
        counts = {series: world.all_sum(count) for series, count in counts.items()}
    extract.require_images(int(images), dataset, corrupt)
    return {series: 100 * count / images for series, count in counts.items()}, int(images)


def score_maps(encoder, features, head: int | None) -> Tensor:
    """Return one attention map per image, float [n, h, w]: of a head, else as maskings average heads or queries.

    Raises UserError for features without attention and for a head that does not exist.
    """
    if features.attention is None:
        raise UserError(
            "localization: this encoder's pooling computes no attention; give a model with pooling cls or simpool"
        )
    heads = features.attention.shape[1]
    if head is not None and head >= heads:
        raise UserError(f"localization: there is no head {head}; this attention has heads 0 to {heads - 1}")
    chosen = patch_attention(features.attention, encoder.pooling.k) if head is None else features.attention[:, head]
    return chosen.float().cpu().unflatten(1, tuple(features.grid))


def scaled_boxes(dataset, index: int, decoded: tuple[int, int]) -> Tensor:
    """Return the boxes of an image at 224 x 224, whole inclusive pixels: float64 [n, 4], truncated (wsolevaluation).

    decoded: size (width, height) of the image, unless the dataset states the size of its boxes.
    """
    width, height = dataset.box_size(index) if hasattr(dataset, "box_size") else decoded
    sides = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = boxed.boxes_of(dataset, index).double()
    if getattr(dataset, "inclusive", not hasattr(dataset, "boxes")):
        boxes = boxes - torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    return (torch.minimum(boxes, sides - 1) * SCORE_SIZE / sides).trunc()


def center_map() -> Tensor:
    """Return a map that falls from the center of the image, float [224, 224]: its level sets are centered discs."""
    line = torch.arange(SCORE_SIZE, dtype=torch.float64) - (SCORE_SIZE - 1) / 2
    return -torch.hypot(line[:, None], line)


def named(accuracy: dict[str, Tensor], level: dict[str, Tensor] | None = None) -> dict[str, float]:
    """Return the numbers of the report from accuracies [255, 3], at the best levels or at the given ones."""
    best = {series: best_levels(table, level and level[series]) for series, table in accuracy.items()}
    numbers = {"max_box_acc_v2": best["v2"]["mean"]}
    numbers |= {f"max_box_acc_v2_iou{100 * iou:.0f}": best["v2"][iou] for iou in BOX_IOUS}
    return {**numbers, "max_box_acc": best["v1"][0.5], "center_max_box_acc_v2": best["center"]["mean"]}

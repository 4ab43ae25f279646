"""Evaluation metrics as functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError
from maskwise.functional.level_sets import contour_boxes, largest_contour_boxes, level_sets
from maskwise.functional.precision import at_least_float32

_CELLS = 1 << 25  # similarities at a time: 128 MiB of float32
SCORE_SIZE = 224  # side in pixels of images and boxes of MaxBoxAcc
LEVELS = 255  # of a score map: thresholds 0, .001, ..., .999 of its maximum, 255, are 255 different ones
BOX_IOUS = (0.3, 0.5, 0.7)
CORLOC_IOU = 0.5


def revisited_map(ranks: Tensor, ground_truth: Sequence[Mapping], ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict]:
    """Return mAP and mP@k of revisited Oxford and Paris (Radenovic et al. 2018), as fractions.

    ranks: int64 [database, queries], indices by falling similarity, possibly truncated; ground_truth: {easy, hard,
    junk} of each query. Returns {"easy"|"medium"|"hard": {"map", "ap" [Q], "mp" [len(ks)]}}. Easy counts easy images
    and ignores hard and junk; medium counts both and ignores junk; hard counts hard ones and ignores the others. A
    query without positives is NaN and left out of the means; positives outside the list count as missed.
    """
    ranks = torch.as_tensor(ranks).cpu()
    split = {
        "easy": (("easy",), ("junk", "hard")),
        "medium": (("easy", "hard"), ("junk",)),
        "hard": (("hard",), ("junk", "easy")),
    }
    results = {}
    for name, (positives, ignored) in split.items():
        scores = [
            average_precision(ranks[:, q], _joined(truth, positives), _joined(truth, ignored), ks)
            for q, truth in enumerate(ground_truth)
        ]
        ap = torch.tensor([ap for ap, _ in scores], dtype=torch.float64)
        precision = torch.tensor([mp for _, mp in scores], dtype=torch.float64).reshape(len(scores), len(ks))
        results[name] = {"map": float(ap.nanmean()), "ap": ap, "mp": precision.nanmean(dim=0).tolist()}
    return results


def average_precision(
    ranks: Tensor, positives: Tensor, ignored: Tensor, ks: Sequence[int] = ()
) -> tuple[float, list[float]]:
    """Return the trapezoid area under the precision-recall curve and precision at k of a query: indices [n], [P], [I].

    Ignored images are removed first. With r_j the 0-based rank of the j-th positive, AP is the sum of
    (j / r_j + (j + 1) / (r_j + 1)) / 2 over the positives, divided by P; j / r_j is 1 at rank 0. Precision is among the
    first min(k, rank of the last positive) images. NaN without positives; 0 if none is retrieved.
    """
    if not len(positives):
        return float("nan"), [float("nan")] * len(ks)
    correct = torch.isin(ranks[~torch.isin(ranks, ignored)], positives)
    r = correct.nonzero().flatten().double()
    if not len(r):
        return 0.0, [0.0] * len(ks)
    j = torch.arange(len(r), dtype=torch.float64)
    before = torch.where(r == 0, 1.0, j / r.clamp(min=1))
    area = float(((before + (j + 1) / (r + 1)) / 2).sum() / len(positives))
    reach = [min(k, int(r[-1]) + 1) for k in ks]
    return area, [float(correct[:q].sum()) / q for q in reach]


def _joined(truth: Mapping, keys: Sequence[str]) -> Tensor:
    parts = [torch.as_tensor(truth.get(key, ()), dtype=torch.int64).flatten() for key in keys]
    return torch.cat(parts).unique()


def recall_at_k(
    features: Tensor, labels: Tensor, ks: Sequence[int], gallery: tuple[Tensor, Tensor] | None = None
) -> dict[int, float]:
    """Return recall@k, in per cent: the share of images with their class among the k nearest by cosine.

    features [n, D], labels int64 [n] -> {k: per cent}. Without a gallery (features, labels) the images are searched
    among themselves, each without itself. Equal similarities rank by index. Memory is bounded.
    """
    queries = F.normalize(at_least_float32(features), dim=1)
    bank, bank_labels = (
        (queries, labels) if gallery is None else (F.normalize(at_least_float32(gallery[0]), dim=1), gallery[1])
    )
    labels, bank_labels = labels.to(queries.device), bank_labels.to(queries.device)
    parts = [
        first_correct(queries[rows] @ bank.T, labels[rows][:, None] == bank_labels, rows if gallery is None else None)
        for rows in _chunks(len(queries), len(bank))
    ]
    ranks = torch.cat(parts) if parts else torch.zeros(0)
    most = len(bank)  # the rank of a query without an image of its class
    return {int(k): 100.0 * float((ranks < min(k, most)).double().mean()) for k in ks}


def first_correct(similarity: Tensor, correct: Tensor, own: Tensor | None = None) -> Tensor:
    """Return the 0-based rank of the first correct column: [q, n], bool [q, n] -> int64 [q], n if none is correct.

    Columns `own` [q] are left out.
    """
    if own is not None:
        row = torch.arange(len(own), device=similarity.device)
        correct = correct.clone()
        correct[row, own] = False
        similarity = similarity.clone()
        similarity[row, own] = -float("inf")
    inside = similarity.masked_fill(~correct, -float("inf"))
    best = inside.max(dim=1, keepdim=True).values
    at = (correct & (similarity == best)).int().argmax(dim=1, keepdim=True)  # argmax of equals: the lowest index
    column = torch.arange(similarity.shape[1], device=similarity.device)
    before = (similarity > best) | ((similarity == best) & (column < at))
    return torch.where(correct.any(dim=1), before.sum(dim=1), similarity.shape[1])


def jaccard(predicted: Tensor, truth: Tensor) -> float:
    """Return region similarity J of two masks, bool [H, W] each: intersection over union; 1 if both are empty.

    Source: DAVIS (Perazzi et al. 2016, section 4.1).
    """
    predicted, truth = predicted.bool(), truth.bool()
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def boundary_f(predicted: Tensor, truth: Tensor, bound: float = 0.008) -> float:
    """Return contour accuracy F of two masks, bool [H, W] each: the harmonic mean of precision and recall.

    A boundary pixel is right if the other boundary is at most r = ceil(bound * image diagonal) pixels away. 1 if both
    boundaries are empty, 0 if one is. Source: DAVIS (Perazzi et al. 2016, section 4.1).
    """
    radius = math.ceil(bound * math.hypot(*truth.shape))
    outlines = mask_boundary(predicted), mask_boundary(truth)
    counts = [int(outline.sum()) for outline in outlines]
    if not all(counts):
        return float(counts[0] == counts[1])
    rows, columns = (torch.where((outlines[0] | outlines[1]).any(dim=dim))[0] for dim in (1, 0))
    inside = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    outlines = outlines[0][inside], outlines[1][inside]  # dilating the bounding box alone saves most of the time
    near = [dilate_disk(outline, radius) for outline in outlines]
    precision, recall = (int((outlines[i] & near[1 - i]).sum()) / counts[i] for i in (0, 1))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mask_boundary(mask: Tensor) -> Tensor:
    """Mark pixels unlike their right, lower or lower-right neighbor: bool [H, W] -> bool [H, W].

    The last row looks right only and the last column down only (DAVIS).
    """
    mask = mask.bool()
    boundary = torch.zeros_like(mask)
    boundary[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    boundary[:-1] |= mask[:-1] != mask[1:]
    boundary[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return boundary


def dilate_disk(mask: Tensor, radius: int) -> Tensor:
    """Dilate a mask, bool [H, W], by a disk: all offsets with dx^2 + dy^2 <= radius^2."""
    height, width = mask.shape
    before = F.pad(mask.int().cumsum(dim=1, dtype=torch.int32), (1, 0))
    column = torch.arange(width, device=mask.device)
    dilated = torch.zeros_like(mask)
    for dy in range(min(radius, height - 1) + 1):
        reach = math.isqrt(radius**2 - dy**2)
        ends = (column + reach + 1).clamp(max=width), (column - reach).clamp(min=0)
        row = before[:, ends[0]] > before[:, ends[1]]  # a pixel of the mask within `reach` of the same row
        dilated[: height - dy] |= row[dy:]
        dilated[dy:] |= row[: height - dy]
    return dilated


def segmentation_scores(confusion: Tensor) -> dict:
    """Return mean IoU, mean accuracy and pixel accuracy of a confusion matrix [C, C] with true classes as rows.

    -> {"miou", "macc", "aacc", "iou" [C]}, fractions. IoU of a class without a true or predicted pixel is NaN and left
    out of the mean; accuracy is averaged over classes with true pixels. Further columns, [C, C + n], count predictions
    of no class. Counts must be of the whole set: a mean of the IoU of single images is another quantity.
    """
    counts = torch.as_tensor(confusion).double()
    right, truth, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)[: len(counts)]
    iou, accuracy = right / (truth + predicted - right), right / truth
    return {
        "miou": float(iou.nanmean()),
        "macc": float(accuracy.nanmean()),
        "aacc": float(right.sum() / truth.sum()),
        "iou": iou,
    }


def feature_variance(maps: Tensor) -> dict[str, float]:
    """Return the variance of a layer's features: [B, C, H, W] -> {"spatial", "channel"}, means over the images.

    spatial: unbiased variance over positions, averaged over channels; channel: unbiased variance over channels,
    averaged over positions; NaN over a single one (Park and Kim 2022; MAP, fig. 2).
    """
    flat = at_least_float32(maps).flatten(2)
    return {"spatial": _variance(flat, 2), "channel": _variance(flat, 1)}


def _variance(flat: Tensor, dim: int) -> float:
    return float(flat.var(dim=dim).double().mean()) if flat.shape[dim] > 1 else float("nan")


def token_errors(predictions: Tensor, joint: Tensor, labels: Tensor) -> dict[str, float]:
    """Decompose the zero-one error of k predictors (MAP, eq. 2, after Domingos 2000), in per cent.

    Classes int64 [n, k], [n] and [n] -> {"bias": error of the joint prediction, "variance": share of predictions
    unlike the joint one, "error": share of wrong predictions}.
    """
    errors = {
        "bias": joint != labels,
        "variance": predictions != joint[:, None],
        "error": predictions != labels[:, None],
    }
    return {name: 100.0 * float(error.double().mean()) for name, error in errors.items()}


def group_scatter(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scatter of values [n, G, T, C] within and between groups, [n] each.

    Mean squared distances, per coordinate, to the group's mean, and of these means to the whole mean; their sum is the
    scatter around the whole mean.
    """
    groups = values.mean(dim=2)
    within = (values - groups[:, :, None]).square().mean(dim=(1, 2, 3))
    return within, (groups - groups.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2))


def max_box_acc(score_maps: Tensor, boxes: Sequence[Tensor], version: int = 2) -> dict:
    """Return MaxBoxAccV2 of score maps (Choe et al. 2020), in per cent: {"mean", 0.3, 0.5, 0.7}.

    score_maps: [B, h, w] of any size, for images resized to 224 x 224; boxes: [n, 4] each as x0, y0, x1, y1, inclusive
    pixels at 224. An image counts at a threshold and an IoU if one of the map's contours overlaps one of the boxes that
    much; each IoU (0.3, 0.5, 0.7) has the threshold that is best over all images. version 1 takes the largest contour
    only; MaxBoxAcc is its number at 0.5. Raises UserError for another version and without SciPy.
    """
    if version not in (1, 2):
        raise UserError(f"max_box_acc: version is {version}; it must be 1 (largest contour) or 2 (all contours)")
    pairs = zip(score_maps, boxes, strict=True)
    hits = torch.stack([level_hits(*level_boxes(score_map, version)[0], truth) for score_map, truth in pairs])
    return best_levels(100.0 * hits.double().mean(dim=0))


def best_levels(accuracy: Tensor, level: Tensor | None = None) -> dict:
    """Return {"mean", 0.3, 0.5, 0.7} of accuracies [255, 3], at the best levels or at the given one of each IoU."""
    level = accuracy.argmax(dim=0) if level is None else level
    best = accuracy.gather(0, level[None])[0].tolist()
    return {"mean": sum(best) / len(best), **dict(zip(BOX_IOUS, best))}


def level_boxes(score_map: Tensor, *versions: int) -> list[tuple[Tensor, Tensor]]:
    """Return the boxes of a score map [h, w] for every threshold: (level int64 [n], boxes int64 [n, 4]) per version.

    Boxes are at 224 x 224. As in wsolevaluation they end one pixel behind their contour, where there is one. See
    `max_box_acc`.
    """
    parts = level_sets(quantized(score_map).numpy(), LEVELS)
    found = []
    for version in versions:
        pair = contour_boxes(parts) if version == 2 else largest_contour_boxes(parts)
        level, inside = (torch.from_numpy(part).long() for part in pair)
        found.append((level, (inside + torch.tensor([0, 0, 1, 1])).clamp(max=SCORE_SIZE - 1)))
    return found


def level_hits(level: Tensor, boxes: Tensor, truth: Tensor) -> Tensor:
    """Return at which levels a box matches one of `truth` -> bool [255, 3], for IoU 0.3, 0.5 and 0.7.

    level, boxes: of `level_boxes`; a level without any has the box 0, 0, 0, 0. Pixels are inclusive.
    """
    truth = truth.to("cpu", torch.float64).reshape(-1, 4)
    iou = torch.zeros(LEVELS, dtype=torch.float64)
    if len(truth):
        iou += box_iou(torch.zeros(1, 4), truth, inclusive=True).max()
        iou[level] = 0.0
        iou.scatter_reduce_(0, level, box_iou(boxes, truth, inclusive=True).amax(dim=1), "amax")
    return iou[:, None] >= torch.tensor(BOX_IOUS, dtype=torch.float64)


def quantized(score_map: Tensor) -> Tensor:
    """Resize a score map [h, w] to 224 x 224 (cubic) and scale it to 0..255 -> uint8 [224, 224].

    A constant map, or one with a non-finite value, becomes 0.
    """
    size = (SCORE_SIZE, SCORE_SIZE)
    scores = at_least_float32(score_map.detach()).cpu()[None, None]
    if not torch.isfinite(scores).all() or scores.min() == scores.max():
        return torch.zeros(size, dtype=torch.uint8)
    if tuple(scores.shape[-2:]) != size:
        scores = F.interpolate(scores, size=size, mode="bicubic", align_corners=False)
    low, high = scores.aminmax()
    return ((scores[0, 0] - low) / (high - low) * LEVELS).to(torch.uint8)


def corloc(predicted: Tensor, truth: Sequence[Tensor]) -> float:
    """Return CorLoc, in per cent: the share of images whose box has an IoU of at least 0.5 with a true one.

    predicted: [B, 4] as x0, y0, x1, y1, maxima exclusive; truth: [n, 4] each; images without true boxes are left out.
    NaN without images (Deselaers et al. 2010).
    """
    correct = [
        bool((box_iou(box[None], boxes) >= CORLOC_IOU).any())
        for box, boxes in zip(torch.as_tensor(predicted), truth, strict=True)
        if len(boxes)
    ]
    return 100.0 * sum(correct) / len(correct) if correct else float("nan")


def box_iou(boxes: Tensor, others: Tensor, inclusive: bool = False) -> Tensor:
    """Return the intersection over union of boxes [n, 4] and [m, 4] as x0, y0, x1, y1 -> float64 [n, m].

    inclusive: maxima are pixels of the box, so that its width is x1 - x0 + 1. Two empty boxes give 0.
    """
    boxes, others = boxes.double()[:, None], torch.as_tensor(others).double().to(boxes.device)[None]
    extra = 1.0 if inclusive else 0.0

    def area(corners: Tensor) -> Tensor:
        return (corners[..., 2:] - corners[..., :2] + extra).clamp(min=0).prod(dim=-1)

    inner = torch.cat(
        [torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])], -1
    )
    shared = area(inner)
    union = area(boxes) + area(others) - shared
    return torch.where(union > 0, shared / union, 0.0)


def _chunks(rows: int, columns: int) -> list[Tensor]:
    return list(torch.arange(rows).split(max(1, _CELLS // max(1, columns)))) if rows else []

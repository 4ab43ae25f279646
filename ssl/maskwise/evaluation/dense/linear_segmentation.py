"""Linear segmentation: a 1 x 1 convolution on frozen patch features, tested by a sliding window."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count, NonNegative, NonNegativeInt, Positive
from maskwise.data.augmentation.segmentation_crop import SegmentationCrop
from maskwise.data.benchmark_sets import ade20k
from maskwise.data.benchmark_sets.label_maps import IGNORED
from maskwise.errors import UserError
from maskwise.evaluation.dense.label_sets import count_pixels, iou_of_classes, largest_class, numbers_of, scored_classes
from maskwise.evaluation.dense.patch_maps import ShortSide, layers_of, padded, patch_map, sliding_logits, window_of
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.features.reading import read
from maskwise.evaluation.features.views import patch_of
from maskwise.evaluation.probes.gradient_sync import gather_all, sum_gradients
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional import keyed_random

_CELLS = 1 << 27  # logits at a time: 512 MiB of float32
WARMUP, WARMUP_RATIO = 1500, 1e-6
PUBLISHED = {"size": 512, "iterations": 160_000, "batch_size": 16, "lr": 3e-5, "weight_decay": 0.05}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSegmentationOptions(Options):
    """Options of linear segmentation.

    size: side of crops and windows; stride: of the windows (default: two thirds of the size); blocks: from 1, whose
    patches are concatenated (default: 4, 6, 8 and 12 of 12, in proportion); batch_norm: before the convolution;
    warmup: iterations (default: 1500, in proportion where that is no shorter than the run); augment=False trains on
    the center of each image, whose features are computed once and kept in memory; ignored: labels that are left out;
    feature_batch: crops in a pass of the encoder.
    """

    evaluation = "linear_segmentation"

    size: Count = 512
    stride: Count | None = None
    blocks: Sequence[Count] | None = None
    batch_norm: bool = False
    iterations: Count = 160_000
    warmup: NonNegativeInt | None = None
    batch_size: Count = 16
    lr: Positive = 3e-5
    weight_decay: NonNegative = 0.05
    augment: bool = True
    ignored: NonNegativeInt | Sequence[NonNegativeInt] | None = None
    feature_batch: Count = 16
    seed: int = 0


def linear_segmentation(encoder, data: dict, world=None, **options) -> Report:
    """Train a linear layer on frozen patches of data["train"] and score it on data["test"] -> Report, in per cent.

    options: those of `LinearSegmentationOptions`. Numbers: mean IoU, mean accuracy and pixel accuracy of one confusion
    matrix over all test pixels; protocol.iou has the IoU of each class. Ranks share batches and test images.
    Raises UserError for sets without label maps and for training images that cannot be read.
    """
    begin, chosen = time.perf_counter(), LinearSegmentationOptions(**options)
    layers, window = layers_of(encoder, chosen.blocks), window_of(encoder, chosen.size)
    classes = scored_classes("linear_segmentation", data, ("train", "test"), chosen.ignored)
    device, corrupt = next(encoder.parameters()).device, {}
    with extract.evaluating(encoder):
        width = feature_width(encoder, layers, window)
        head = LinearHead(width, len(classes), chosen.batch_norm, chosen.seed).to(device)
        train_begin = time.perf_counter()
        loss = train(head, encoder, data["train"], classes, layers, window, world, chosen)
        seconds = time.perf_counter() - train_begin
        table = test_counts(head, encoder, data["test"], classes, layers, window, world, chosen, corrupt)
    images = chosen.iterations * chosen.batch_size + len(data["test"])
    return Report(
        numbers=numbers_of(table),
        protocol={
            "evaluation": "linear_segmentation",
            "preset": "simpool",
            "layers": [layer + 1 for layer in layers] or "last",
            "width": width,
            **{name: getattr(chosen, name) for name in PUBLISHED},
            "size": window,
            "stride": stride_of(chosen, window),
            "warmup": warmup_of(chosen),
            "batch_norm": chosen.batch_norm,
            "augment": chosen.augment,
            "schedule": "linear to 0 per iteration",
            "seed": chosen.seed,
            "classes": len(classes),
            "ignored": chosen.ignored,
            "train": len(data["train"]),
            "test": len(data["test"]),
            "last_loss": loss,
            "iou": iou_of_classes(table, classes),
            "differences": differences(encoder, chosen, layers, window, data),
        },
        data_hash=joint_hash(*(fingerprint(data[role]) for role in ("train", "test"))),
        cost={**cost(begin, images, device), "training_seconds": round(seconds, 3)},
        corrupt=gather_all(corrupt, world),
        seeds={"crops": chosen.seed},
    )


class LinearHead(nn.Module):
    """Classes of patch features: [B, F, h, w] -> logits [B, C, h, w]; weights from N(0, .01), biases 0."""

    def __init__(self, width: int, classes: int, batch_norm: bool = False, seed: int = 0):
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.classify = nn.Conv2d(width, classes, 1)
        with keyed_random.seed_scope(int(keyed_random.make_key(41, seed))):
            nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map features [B, F, h, w] to logits [B, C, h, w]."""
        return self.classify(self.norm(maps))


def feature_width(encoder, layers: tuple[int, ...], window: int) -> int:
    """Return the number of channels of the patch map of a window."""
    first = next(encoder.parameters())
    with torch.no_grad():
        zeros = torch.zeros(1, len(encoder.mean), window, window, device=first.device, dtype=first.dtype)
        return patch_map(encoder, zeros, layers).shape[1]


def train(head, encoder, dataset, classes, layers, window: int, world, chosen: LinearSegmentationOptions) -> float:
    """Train the head by AdamW on crops -> the loss of the last iteration (this rank's share)."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay)
    source = fixed_batches if not chosen.augment else crop_batches
    loss, pixels = 0.0, min(chosen.batch_size, len(dataset)) * window * window
    shared = world if shares_batches(chosen) else None
    head.train()
    for step, (maps, labels) in enumerate(source(encoder, dataset, classes, layers, window, world, chosen)):
        optimizer.param_groups[0]["lr"] = chosen.lr * rate(step, chosen.iterations, warmup_of(chosen))
        optimizer.zero_grad()
        loss = segmentation_loss(head, maps, labels, pixels)
        sum_gradients(head, shared)
        optimizer.step()
    return loss


def segmentation_loss(head, maps: Tensor, labels: Tensor, pixels: int) -> float:
    """Add the gradients of the cross-entropy of interpolated logits, summed over labeled pixels, over `pixels`.

    maps [B, F, h, w], labels int64 [B, S, S]. The mean is over all pixels, unlabeled ones included, as in
    mmsegmentation 0.30. Images are interpolated a few at a time unless batch norm needs them together.
    """
    size, total = labels.shape[-2:], 0.0
    logits = head(maps)
    free = logits.detach().requires_grad_()
    rows = max(1, _CELLS // (logits.shape[1] * size[0] * size[1]))
    for part, truth in zip(free.split(rows), labels.split(rows)):
        large = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(large, truth, ignore_index=IGNORED, reduction="sum") / pixels
        loss.backward()
        total += float(loss.detach())
    logits.backward(free.grad)
    return total


def shares_batches(chosen: LinearSegmentationOptions) -> bool:
    """Return whether ranks share a batch: not with batch norm, whose statistics are of the whole batch."""
    return not chosen.batch_norm


def rate(step: int, total: int, warmup: int) -> float:
    """Return the factor of the learning rate: 1 to 0, linear per iteration, after a linear warm-up from 1e-6 of it."""
    factor = 1 - step / total
    return factor * (1 - (1 - step / warmup) * (1 - WARMUP_RATIO)) if step < warmup else factor


def warmup_of(chosen: LinearSegmentationOptions) -> int:
    """Return the iterations of warm-up: given, or 1500, or of a short run as large a share as that is of 160,000."""
    if chosen.warmup is not None:
        return chosen.warmup
    long_enough = chosen.iterations > WARMUP
    return WARMUP if long_enough else WARMUP * chosen.iterations // PUBLISHED["iterations"]


def stride_of(chosen: LinearSegmentationOptions, window: int) -> int:
    """Return the stride of the windows: given, or two thirds of the window (341 of 512)."""
    return chosen.stride or max(1, 2 * window // 3)


def batch_rows(count: int, world, chosen: LinearSegmentationOptions) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (epoch, this rank's rows of each of its batches): shuffled epochs without a rest, `iterations` in all."""
    rank, size = (0, 1) if world is None or not shares_batches(chosen) else (world.rank, world.size)
    left, epoch = chosen.iterations, 0
    while left:
        order = keyed_random.order(chosen.seed, epoch, count)
        whole = order[: max(count // chosen.batch_size, 1) * chosen.batch_size].split(chosen.batch_size)[:left]
        yield epoch, [batch[rank::size] for batch in whole]
        left, epoch = left - len(whole), epoch + 1


def crop_batches(encoder, dataset, classes, layers, window: int, world, chosen) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (features [b, F, h, w], labels [b, S, S]) of new crops, on the device."""
    for epoch, batches in batch_rows(len(dataset), world, chosen):
        view = TrainingView(encoder, dataset, classes, window, SegmentationCrop(window, seed=chosen.seed, epoch=epoch))
        for rows in batches:
            yield features_and_labels(encoder, dataset, view, rows, layers, chosen)


def fixed_batches(encoder, dataset, classes, layers, window: int, world, chosen) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (features, labels) of the centers of the images, computed at first use and kept in memory."""
    view = TrainingView(encoder, dataset, classes, window, SegmentationCrop(window, augment=False))
    device, kept = next(encoder.parameters()).device, {}
    for _, batches in batch_rows(len(dataset), world, chosen):
        for rows in batches:
            missing = [row for row in rows.tolist() if row not in kept]
            if missing:
                maps, labels = features_and_labels(encoder, dataset, view, torch.tensor(missing), layers, chosen)
                kept |= {row: (m, t) for row, m, t in zip(missing, maps.cpu(), labels.to(torch.uint8).cpu())}
            parts = [kept[row] for row in rows.tolist()]
            if parts:
                maps, labels = (torch.stack(part).to(device) for part in zip(*parts))
                yield maps, labels.long()
            else:
                yield features_and_labels(encoder, dataset, view, rows, layers, chosen)


class TrainingView:
    """A crop and its classes in one tensor: normalized [C + 1, S, S], padded with zeros and unlabeled pixels."""

    def __init__(self, encoder, dataset, classes, window: int, crop: SegmentationCrop):
        self.mean, self.std = (torch.tensor(values).reshape(-1, 1, 1) for values in (encoder.mean, encoder.std))
        self.dataset, self.classes, self.window, self.crop = dataset, classes, window, crop

    def __call__(self, image: Tensor, index: int) -> Tensor:
        labels = self.classes.index(self.dataset.label_map(index))
        if labels.shape != image.shape[-2:]:
            raise UserError(
                f"{self.dataset.name(index)} is {image.shape[-1]}x{image.shape[-2]} pixels and its label map "
                f"{labels.shape[1]}x{labels.shape[0]}; give a label map of the image's size"
            )
        largest = torch.iinfo(image.dtype).max
        image, labels = self.crop(image, labels, index)
        normal = (image.float() / largest - self.mean) / self.std
        right, below = self.window - normal.shape[-1], self.window - normal.shape[-2]
        normal = F.pad(normal, (0, right, 0, below))
        return torch.cat([normal, F.pad(labels[None].float(), (0, right, 0, below), value=IGNORED)])


def features_and_labels(encoder, dataset, view, rows: Tensor, layers, chosen) -> tuple[Tensor, Tensor]:
    """Return features [b, F, h, w] and classes int64 [b, S, S] of crops of some rows, on the device.

    Raises UserError for an image that cannot be read.
    """
    first, corrupt, maps, labels = next(encoder.parameters()), {}, [], []
    for _, crops in read(dataset, view, rows, chosen.feature_batch, corrupt, channels=len(encoder.mean)):
        crops = crops.to(first.device, non_blocking=True)
        with torch.no_grad():
            maps.append(patch_map(encoder, crops[:, :-1].to(first.dtype), layers))
        labels.append(crops[:, -1].long())
    if corrupt:
        name, reason = next(iter(corrupt.items()))
        raise UserError(f"linear_segmentation: {name} cannot be read ({reason}); leave it and its label map out")
    if not maps:  # fewer images than ranks
        with torch.no_grad():
            zeros = torch.zeros(1, len(encoder.mean), view.window, view.window, device=first.device, dtype=first.dtype)
            return patch_map(encoder, zeros, layers), torch.full((1, view.window, view.window), IGNORED).to(
                zeros.device
            )
    return torch.cat(maps), torch.cat(labels)


def test_counts(
    head, encoder, dataset, classes, layers, window: int, world, chosen: LinearSegmentationOptions, corrupt: dict
) -> Tensor:
    """Return the confusion matrix of all test pixels, int64 [C, C]; ranks share the images."""
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    first, patch = next(encoder.parameters()), patch_of(encoder)
    mean, std = (torch.tensor(values, device=first.device).reshape(-1, 1, 1) for values in (encoder.mean, encoder.std))
    table = torch.zeros(len(classes), len(classes), dtype=torch.int64)

    def predict(images: Tensor) -> Tensor:
        whole = padded(images, patch)
        logits = F.interpolate(
            head(patch_map(encoder, whole, layers)), size=whole.shape[-2:], mode="bilinear", align_corners=False
        )
        return logits[..., : images.shape[-2], : images.shape[-1]]

    mine = torch.arange(rank, len(dataset), size)
    with extract.evaluating(head), torch.no_grad():
        for index, images in read(dataset, ShortSide(chosen.size), mine, 1, corrupt, channels=len(encoder.mean)):
            images = (images.to(first.device).float() / torch.iinfo(images.dtype).max - mean) / std
            logits = sliding_logits(predict, images.to(first.dtype), window, stride_of(chosen, window))[0]
            truth = classes.index(dataset.label_map(int(index)))
            table += count_pixels(largest_class(logits, tuple(truth.shape)), truth, len(classes))
    if world is not None:
        table = world.all_sum(table.to(first.device)).cpu()
    if not int(table.sum()):
        raise UserError("linear_segmentation: no test image has a labeled pixel and can be read; give others")
    return table


def differences(encoder, chosen: LinearSegmentationOptions, layers, window: int, data: dict) -> list[str]:
    """List what differs from the paper's protocol."""
    lines = [
        f"{name}={getattr(chosen, name):g} instead of {value:g}"
        for name, value in PUBLISHED.items()
        if getattr(chosen, name) != value
    ]
    if window != chosen.size:
        lines.append(f"windows of {window} pixels, whole patches")
    if chosen.batch_norm:
        lines.append("batch norm before the linear layer")
    if not chosen.augment:
        lines.append("centers of the images instead of random crops")
    if chosen.blocks is not None:
        lines.append(f"blocks {list(chosen.blocks)} instead of 4, 6, 8 and 12 of 12")
    elif not layers:
        lines.append("patches of the last block only")
    elif getattr(encoder.backbone, "stage_dims", None):
        lines.append("all stages of a network of feature maps, resized to the last but one")
    if getattr(data["train"], "class_count", None) != ade20k.CLASSES:
        lines.append("other images than ADE20K")
    return lines

"""Detection and instance segmentation: torchvision's Mask R-CNN fine-tuned for some steps, scored by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.bounds import Count, NonNegative, Positive
from maskwise.data.benchmark_sets import coco
from maskwise.data.decoding.image import CorruptImage
from maskwise.errors import UserError
from maskwise.evaluation.dense.feature_pyramid import pyramid_of
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.features.views import patch_of
from maskwise.evaluation.probes.gradient_sync import gather_all, sum_gradients
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional import keyed_random

STREAM = 49  # of keyed random numbers: flips, and what torchvision samples in a step
NOT_COMPARABLE = (
    "not comparable with published numbers: torchvision's Mask R-CNN for {steps} steps, instead of Cascade Mask R-CNN "
    "for 12 epochs with augmentation of sizes and layer decay"
)
# names of pycocotools' summary, in its order
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionOptions(Options):
    """Options of detection.

    steps: of training; size: short side of the images, the long one at most 5/3 of it; frozen: train the pyramid and
    heads alone; regions: of an image, that train the heads in a step; detections: of a test image, at most.
    """

    evaluation = "detection"

    steps: Count = 5000
    batch_size: Count = 4
    lr: Positive = 1e-4
    weight_decay: NonNegative = 0.05
    size: Count = 800
    frozen: bool = False
    regions: Count = 512
    detections: Count = 100
    seed: int = 0


def read(folder) -> dict:
    """Read a folder in the layout of COCO -> {"test", "train" if there are annotations}, {} for any other folder."""
    if not coco.matches(Path(folder)):
        return {}
    sets = coco.read(folder)
    for year in coco.YEARS:
        if "train" not in sets and coco.has_part(folder, f"train{year}"):
            sets["train"] = coco.read(folder, part=f"train{year}")["test"]
    return sets


def detection(encoder, data: dict, world=None, **options) -> Report:
    """Fine-tune Mask R-CNN on data["train"] and score boxes and masks of data["test"] -> Report, AP in per cent.

    options: those of `DetectionOptions`. The encoder is copied; a Vision Transformer gets a simple pyramid of its last
    patches, other networks a feature pyramid of their stages. Numbers: `box_...` and `mask_...` of pycocotools, NaN for
    sizes without objects. The numbers are not comparable with published ones. Ranks share batches and test images.
    Raises UserError without pycocotools or torchvision's compiled operators, and for data that are not COCO's.
    """
    begin, chosen = time.perf_counter(), DetectionOptions(**options)
    require_libraries()
    for role in ("train", "test"):
        if not hasattr(data.get(role), "image_id"):
            raise UserError(
                f"detection: no {role} images with instances; give {role}=FOLDER in the layout of COCO, with "
                "annotations/instances_*.json"
            )
    if world is not None and chosen.batch_size < world.size:
        raise UserError(f"detection: batch_size={chosen.batch_size} is less than {world.size} ranks; give more")
    device, corrupt = next(encoder.parameters()).device, {}
    truth = {role: annotations(data[role].file) for role in ("train", "test")}
    categories = sorted(truth["train"].getCatIds())
    network = mask_rcnn(encoder, len(categories), chosen).to(device)
    train_begin = time.perf_counter()
    loss = train(network, data["train"], truth["train"], categories, world, chosen)
    seconds = time.perf_counter() - train_begin
    boxes, masks = predictions(network, data["test"], categories, world, corrupt)
    numbers, ids = {}, [data["test"].image_id(i) for i in range(len(data["test"]))]
    for kind, name, results in (("bbox", "box", boxes), ("segm", "mask", masks)):
        scores = average_precisions(truth["test"], results, ids, kind)
        numbers |= {f"{name}_{key}": value for key, value in scores.items()}
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "detection",
            "preset": "the papers",
            "network": "torchvision MaskRCNN",
            "pyramid": type(network.backbone).__name__,
            **{field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)},
            "schedule": "warm-up of a tenth of the steps, at most 500; a tenth of the rate after 8/12 and 11/12",
            "categories": len(categories),
            "train": len(data["train"]),
            "test": len(data["test"]),
            "last_loss": loss,
            "comparable": False,
            "differences": [NOT_COMPARABLE.format(steps=chosen.steps)],
        },
        data_hash=joint_hash(*(fingerprint(data[role]) for role in ("train", "test"))),
        cost={
            **cost(begin, chosen.steps * chosen.batch_size + len(data["test"]), device),
            "training_seconds": round(seconds, 3),
        },
        corrupt=gather_all(corrupt, world),
        seeds={"training": chosen.seed},
    )


def require_libraries() -> None:
    """Raise UserError without pycocotools or without torchvision's compiled operators."""
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise UserError("detection is scored by pycocotools: pip install 'maskwise[eval]'") from None
    import torchvision

    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (RuntimeError, NotImplementedError, AttributeError):
        raise UserError(
            f"detection needs torchvision's compiled operators; torchvision {torchvision.__version__} was built for "
            f"another torch than {torch.__version__}: install a pair that fits"
        ) from None


def annotations(path: Path):
    """Open an annotation file by pycocotools, without its messages. Raises UserError for objects without outlines."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        table = COCO(str(path))
    lacking = next((entry for entry in table.anns.values() if not entry.get("segmentation")), None)
    if lacking is not None:
        raise UserError(f"detection: {path}: annotation {lacking.get('id')} has no segmentation; give COCO's instances")
    return table


def mask_rcnn(encoder, categories: int, chosen: DetectionOptions):
    """Return torchvision's Mask R-CNN over a copy of the encoder; its random weights depend on the seed alone."""
    from torchvision.models.detection import MaskRCNN

    patch = max(patch_of(encoder))
    unit = 32 if 32 % patch == 0 else patch
    with keyed_random.seed_scope(int(keyed_random.make_key(STREAM, chosen.seed))):
        backbone = pyramid_of(copy.deepcopy(encoder))
        network = MaskRCNN(
            backbone,
            categories + 1,
            min_size=chosen.size,
            max_size=chosen.size * 5 // 3,
            image_mean=list(encoder.mean),
            image_std=list(encoder.std),
            size_divisible=unit,
            box_batch_size_per_image=chosen.regions,
            box_detections_per_img=chosen.detections,
        )
    backbone.encoder.requires_grad_(not chosen.frozen)
    return network


def train(network, dataset, truth, categories: Sequence[int], world, chosen: DetectionOptions) -> float:
    """Train by AdamW on whole images and their mirror images -> the loss of the last step (this rank's share)."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=chosen.lr, weight_decay=chosen.weight_decay)
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    device, loss = trained[0].device, torch.zeros(())
    network.train()
    for step in range(chosen.steps):
        optimizer.param_groups[0]["lr"] = chosen.lr * rate(step, chosen.steps)
        places = range(step * chosen.batch_size + rank, (step + 1) * chosen.batch_size, size)
        pairs = [training_pair(dataset, truth, categories, place, chosen.seed) for place in places]
        images = [image.to(device) for image, _ in pairs]
        targets = [{key: value.to(device) for key, value in target.items()} for _, target in pairs]
        with keyed_random.seed_scope(int(keyed_random.make_key(STREAM, chosen.seed, step, rank))):
            loss = sum(network(images, targets).values()) / size
        if not torch.isfinite(loss):
            raise UserError(f"detection: the loss is not finite at step {step}; lower lr")
        optimizer.zero_grad()
        loss.backward()
        sum_gradients(network, world)
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
    return float(loss.detach())


def rate(step: int, total: int) -> float:
    """Return the factor of the learning rate: linear warm-up, 1, .1 after 8/12 and .01 after 11/12 of the steps."""
    warmup = min(500, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 ** (int(12 * step >= 8 * total) + int(12 * step >= 11 * total))


def training_pair(dataset, truth, categories: Sequence[int], place: int, seed: int) -> tuple[Tensor, dict]:
    """Return the image [C, H, W] in 0..1 and torchvision's target at a place of the endless shuffled sequence.

    Raises UserError for an image that cannot be read.
    """
    epoch, position = divmod(place, len(dataset))
    index = int(keyed_random.order(seed, epoch, len(dataset))[position])
    try:
        image = dataset.image(index)
    except CorruptImage as error:
        raise UserError(f"detection: {dataset.name(index)} cannot be read ({error.reason}); leave it out") from None
    target = instance_target(truth, dataset.image_id(index), categories, tuple(image.shape[-2:]))
    image = image.float() / torch.iinfo(image.dtype).max
    if float(keyed_random.uniform(keyed_random.make_key(STREAM, seed, epoch, index, 1), 1)) < 0.5:
        image, target = image.flip(-1), mirrored(target, image.shape[-1])
    return image, target


def instance_target(truth, image_id: int, categories: Sequence[int], size: tuple[int, int]) -> dict:
    """Return boxes [n, 4] (x0, y0, x1, y1), labels int64 [n] from 1, masks uint8 [n, H, W], without crowds."""
    entries = [
        entry
        for entry in truth.loadAnns(truth.getAnnIds(imgIds=[image_id]))
        if not entry.get("iscrowd") and min(entry["bbox"][2:]) >= 1
    ]
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.stack([truth.annToMask(entry) for entry in entries]) if entries else np.zeros((0, *size), np.uint8)
    return {
        "boxes": boxes,
        "labels": torch.tensor([categories.index(entry["category_id"]) + 1 for entry in entries], dtype=torch.int64),
        "masks": torch.from_numpy(masks),
    }


def mirrored(target: dict, width: int) -> dict:
    """Return the target of the mirror image."""
    boxes = target["boxes"].clone()
    boxes[:, 0], boxes[:, 2] = width - target["boxes"][:, 2], width - target["boxes"][:, 0]
    return {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


@torch.no_grad()
def predictions(network, dataset, categories: Sequence[int], world, corrupt: dict) -> tuple[list[dict], list[dict]]:
    """Return boxes and masks of all test images in the format of COCO's results; ranks share the images."""
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    device, boxes, masks = next(network.parameters()).device, [], []
    network.eval()
    for index in range(rank, len(dataset), size):
        try:
            image = dataset.image(index)
        except CorruptImage as error:
            corrupt[dataset.name(index)] = error.reason
            continue
        found = network([(image.float() / torch.iinfo(image.dtype).max).to(device)])[0]
        found = {key: value.cpu() for key, value in found.items()}
        for box, label, score, mask in zip(found["boxes"], found["labels"], found["scores"], found["masks"]):
            entry = {
                "image_id": dataset.image_id(index),
                "category_id": categories[int(label) - 1],
                "score": float(score),
            }
            x0, y0, x1, y1 = box.tolist()
            boxes.append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]})
            masks.append({**entry, "segmentation": run_lengths(mask[0] > 0.5)})
    if world is None:
        return boxes, masks
    return tuple([row for part in world.gather_objects(rows) for row in part] for rows in (boxes, masks))


def run_lengths(mask: Tensor) -> dict:
    """Return COCO's run-length encoding of a mask, bool [H, W]."""
    from pycocotools import mask as encoding

    return encoding.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


def average_precisions(truth, results: list[dict], ids: Sequence[int], kind: str) -> dict[str, float]:
    """Return COCO's AP of results, by pycocotools, in per cent; kind: "bbox" or "segm".

    NaN where there is no object of a size.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(copy.deepcopy(results)) if results else _nothing(truth)
        scorer = COCOeval(truth, found, kind)
        scorer.params.imgIds = sorted(ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    values = [float(value) for value in scorer.stats[: len(SUMMARY)]]
    return {name: math.nan if value < 0 else 100 * value for name, value in zip(SUMMARY, values)}


def _nothing(truth):
    """Return results without an entry, which pycocotools cannot load."""
    from pycocotools.coco import COCO

    empty = COCO()
    empty.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"], "annotations": []}
    empty.createIndex()
    return empty

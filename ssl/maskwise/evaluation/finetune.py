"""Fine-tuning for classification: a copy of the encoder and a linear head are trained (DeiT and BEiT recipes)."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.bounds import Count, NonNegative, NonNegativeInt, Positive, Rate
from maskwise.distributed.environment import local_world_size
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, feature_names
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.probes.finetune_batches import Augmentation, TransferBatches
from maskwise.evaluation.probes.gradient_sync import gather_all, sum_gradients
from maskwise.evaluation.probes.layer_decay import layer_groups
from maskwise.evaluation.protocol import Options, fitting_warmup, labeled_sets
from maskwise.evaluation.report import Report, joint_hash
from maskwise.functional import keyed_random
from maskwise.process.progress import counted

DROP, HEAD = 43, 44  # streams of keyed random numbers, distinct from those of functional.keyed_random

DEIT = {
    "lr": 7.5e-6,
    "lr_per": 512,
    "batch_size": 768,
    "epochs": 1000,
    "weight_decay": 0.05,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "schedule": "epoch",
    "layer_decay": 1.0,
    "drop_path": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "erasing": 0.25,
    "repeats": 3,
    "head_scale": 1.0,
    "evaluate_every": 1,
}
BEIT = DEIT | {
    "lr": 4e-3,
    "lr_per": None,
    "batch_size": 1024,
    "warmup_epochs": 20,
    "warmup_lr": 0.0,
    "min_lr": 1e-6,
    "schedule": "step",
    "repeats": 1,
    "head_scale": 0.001,
}
# preset -> settings, or encoder width -> settings
PRESETS = {
    "deit": DEIT,
    "simpool": DEIT,
    "ibot": DEIT,
    "attmask": DEIT | {"batch_size": 900, "epochs": 500, "evaluate_every": 50},
    "ibot-imagenet": {
        384: BEIT | {"layer_decay": 0.75, "epochs": 200},
        768: BEIT | {"layer_decay": 0.65, "epochs": 100, "drop_path": 0.2},
        1024: BEIT | {"layer_decay": 0.75, "epochs": 50, "drop_path": 0.4, "warmup_epochs": 5},
    },
}


class FineTuned(nn.Module):
    """Encoder and linear head: images [B, C, H, W], int64 drop-path keys [B] -> logits [B, classes] in float32."""

    def __init__(self, encoder: nn.Module, classes: int, *, head_scale: float = 1.0, seed: int = 0):
        super().__init__()
        self.encoder = encoder
        self.head = nn.utils.skip_init(nn.Linear, encoder.dim, classes)
        generator = torch.Generator().manual_seed(int(keyed_random.make_key(HEAD, seed)) & ((1 << 63) - 1))
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator).clamp_(-2, 2).mul_(head_scale)
            self.head.bias.zero_()

    def forward(self, images: Tensor, drop_key: Tensor | None = None) -> Tensor:
        """Map images to logits."""
        return self.head(self.encoder(images, attention=False, drop_key=drop_key).pooled.float())


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Options):
    """Options of fine-tuning; None means as in the preset.

    preset: deit (= simpool, ibot: transfer), attmask, ibot-imagenet (layer decay by the encoder's width); rand_augment:
    a timm policy or "none"; workers: data processes.
    """

    evaluation = "finetune"

    preset: str = "deit"
    lr: Positive | None = None
    batch_size: Count | None = None
    epochs: Count | None = None
    weight_decay: NonNegative | None = None
    warmup_epochs: NonNegativeInt | None = None
    layer_decay: Positive | None = None
    drop_path: Rate | None = None
    mixup: NonNegative | None = None
    cutmix: NonNegative | None = None
    smoothing: Rate | None = None
    rand_augment: str | None = None
    erasing: Rate | None = None
    repeats: Count | None = None
    evaluate_every: Count | None = None
    seed: int = 0
    precision: str = "fp32"
    workers: NonNegativeInt | None = None


def finetune(encoder, data: dict, world=None, **options) -> Report:
    """Fine-tune a copy of the encoder with a new linear head -> Report, accuracies on data["test"] in per cent.

    options: those of `FinetuneOptions`; each replaces the preset's and is listed as a difference. Random numbers are
    keyed; ranks share each batch. Numbers: top1, top5 of the best evaluated epoch on the test set, as published;
    best_epoch from 1; top1_last, top5_last. Raises UserError for options out of range.
    """
    begin, given = time.perf_counter(), FinetuneOptions(**options)
    overrides = {key: getattr(given, key, None) for key in DEIT}
    chosen, paper = settings(encoder, given.preset, overrides)
    check(encoder, chosen, given.precision, world)
    data = labeled_sets("finetune", data, "train", "test")
    device = next(encoder.parameters()).device
    classes = int(max(torch.as_tensor(data[role].labels).max() for role in ("train", "test"))) + 1
    model = tunable(encoder, classes, chosen, given.seed).to(device)
    batches = TransferBatches(
        data["train"],
        encoder,
        Augmentation(**{field.name: chosen[field.name] for field in dataclasses.fields(Augmentation)}),
        batch_size=chosen["batch_size"],
        classes=classes,
        seed=given.seed,
        world=world,
        workers=default_workers(device) if given.workers is None else given.workers,
    )
    corrupt: dict[str, str] = {}
    result = train(model, batches, data["test"], world, chosen, given, corrupt)
    images = len(batches) * chosen["batch_size"] * chosen["epochs"]
    return Report(
        numbers=result.numbers,
        protocol={
            "evaluation": "finetune",
            "preset": given.preset,
            **chosen,
            "optimizer": "adamw",
            "seed": given.seed,
            "precision": given.precision,
            "classes": classes,
            "train": len(data["train"]),
            "test": len(data["test"]),
            "steps_per_epoch": len(batches),
            "selection": "best evaluated epoch on the test set, as published",
            "differences": differences(encoder, given.preset, chosen, paper, given.precision, data["train"]),
        },
        data_hash=joint_hash(*(fingerprint(data[role]) for role in ("train", "test"))),
        cost={
            "seconds": round(time.perf_counter() - begin, 3),
            "images": images,
            "images_per_second": round(images / max(1e-9, result.seconds), 1),
            "device": str(device),
        },
        corrupt=gather_all({**batches.corrupt, **corrupt}, world),
    )


def tunable(encoder: nn.Module, classes: int, chosen: dict, seed: int) -> FineTuned:
    """Return a trainable copy of the encoder with a new head, without mask token, at the chosen drop path."""
    tuned = copy.deepcopy(encoder).requires_grad_(True)
    backbone = getattr(tuned, "backbone", None)
    if getattr(backbone, "mask_token", None) is not None:
        backbone.mask_token = None  # nothing is masked here
    if hasattr(backbone, "drop_path"):
        backbone.drop_path.rate = chosen["drop_path"]
    return FineTuned(tuned, classes, head_scale=chosen["head_scale"], seed=seed)


@dataclasses.dataclass(frozen=True)
class Training:
    """Result of the training: the report's numbers, seconds without scoring."""

    numbers: dict
    seconds: float


def train(
    model: FineTuned, batches: TransferBatches, test, world, chosen: dict, given: FinetuneOptions, corrupt: dict
) -> Training:
    """Train for all epochs, scoring the test images on the way; their unreadable ones go into `corrupt`."""
    backbone, device = getattr(model.encoder, "backbone", None), model.head.weight.device
    depth = None if getattr(backbone, "stage_dims", None) else getattr(backbone, "depth", None)
    groups = layer_groups(model, depth, chosen["weight_decay"], chosen["layer_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, foreach=True)
    rate = schedule(chosen, len(batches))
    best, best_epoch, loss, seconds = (-1.0, -1.0), 0, torch.zeros((), device=device), 0.0
    for epoch in counted(range(chosen["epochs"]), chosen["epochs"], "epochs", "epoch"):
        model.train()
        start = time.perf_counter()
        epoch_batches = counted(batches.epoch(epoch, device), len(batches), "batches", "batch")
        for step, (images, targets, places) in enumerate(epoch_batches):
            lr = rate(epoch, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            key = keyed_random.make_key(DROP, given.seed, epoch, places).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
                logits = model(images, key)
            loss = -(targets * F.log_softmax(logits, dim=1)).sum() / chosen["batch_size"]
            optimizer.zero_grad()
            loss.backward()
            sum_gradients(model, world)
            optimizer.step()
        seconds += time.perf_counter() - start
        if epoch + 1 == chosen["epochs"] or (epoch + 1) % chosen["evaluate_every"] == 0:
            score = accuracy(model, test, world, given.precision, corrupt)
            if score[0] > best[0]:
                best, best_epoch = score, epoch + 1
    last_loss = loss.detach() if world is None else world.all_sum(loss.detach())
    numbers = {"top1": best[0], "top5": best[1], "best_epoch": best_epoch}
    numbers |= {"top1_last": score[0], "top5_last": score[1], "loss_last_step": float(last_loss)}
    return Training(numbers, seconds)


def schedule(chosen: dict, steps: int):
    """Return a function (epoch, step) -> learning rate of the head's layer.

    "epoch": DeiT's, timm's cosine shifted by one epoch, so that epochs 0 and 1 both train at warmup_lr; "step": BEiT's,
    linear from 0 and half a cosine over the remaining steps.
    """
    peak = chosen["lr"] * (chosen["batch_size"] / chosen["lr_per"] if chosen["lr_per"] else 1)
    floor, first, warm, total = chosen["min_lr"], chosen["warmup_lr"], chosen["warmup_epochs"], chosen["epochs"]

    def by_epoch(epoch: int, step: int) -> float:
        t = max(0, epoch - 1)
        if t < warm:
            return first + t * (peak - first) / warm
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * t / total))

    def by_step(epoch: int, step: int) -> float:
        t, ramp, whole = epoch * steps + step, warm * steps, total * steps
        if t < ramp:
            return first + t * (peak - first) / max(1, ramp - 1)
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * (t - ramp) / (whole - ramp)))

    return by_epoch if chosen["schedule"] == "epoch" else by_step


def accuracy(model: FineTuned, dataset, world, precision: str, corrupt: dict) -> tuple[float, float]:
    """Return top-1 and top-5 (or top-C) in per cent by the evaluation transform; ranks share the images."""
    labels, weight = torch.as_tensor(dataset.labels), model.head.weight
    hits = torch.zeros(3, dtype=torch.int64, device=weight.device)
    mine = torch.arange(len(dataset)) if world is None else torch.arange(world.rank, len(dataset), world.size)
    for index, _, features in extract.stream(model.encoder, dataset, rows=mine, precision=precision, corrupt=corrupt):
        with torch.no_grad():
            logits = model.head(features.pooled.float())
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[index].to(weight.device)[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(index), device=weight.device)])
    if world is not None:
        hits = world.all_sum(hits)
    one, five, count = hits.tolist()
    extract.require_images(count, dataset, corrupt)
    return 100 * one / count, 100 * five / count


def settings(encoder, preset: str, given: dict) -> tuple[dict, dict]:
    """Return (settings, the paper's settings); given options that are not None replace the preset's.

    A warm-up that is not given and as long as the run is shortened in proportion.
    """
    if preset not in PRESETS:
        raise UserError(f"finetune: no preset {preset!r}; choose from {', '.join(PRESETS)}")
    paper = PRESETS[preset]
    if preset == "ibot-imagenet":
        paper = paper[min(paper, key=lambda width: (abs(width - encoder.dim), width))]
    chosen = {**paper, **{key: value for key, value in given.items() if value is not None}}
    if given.get("warmup_epochs") is None:
        chosen["warmup_epochs"] = fitting_warmup(chosen["epochs"], paper)
    return chosen, paper


def check(encoder, chosen: dict, precision: str, world) -> None:
    """Raise UserError for settings that cannot be trained, before any image is read."""
    feature_names.check(encoder, ("pooled",), precision)
    if len(encoder.mean) != 3:
        raise UserError(
            f"finetune augments RGB images, and this encoder takes {len(encoder.mean)} channels; evaluate linear or "
            "attentive"
        )
    size = 1 if world is None else world.size
    if chosen["batch_size"] % (2 * size):
        near = max(2 * size, chosen["batch_size"] // (2 * size) * 2 * size)
        raise UserError(
            f"finetune: batch_size {chosen['batch_size']} must divide by {2 * size} (two images are mixed, {size} "
            f"ranks share the batch); give {near}"
        )
    if chosen["warmup_epochs"] >= chosen["epochs"]:
        raise UserError(
            f"finetune: warmup_epochs {chosen['warmup_epochs']} is not shorter than the run of {chosen['epochs']} "
            f"epochs; give warmup_epochs={max(0, chosen['epochs'] // 10)}"
        )
    if size > 1 and any(isinstance(part, _BatchNorm) for part in encoder.modules()):
        raise UserError(f"finetune: batch norm is not synchronized between {size} ranks here; use one rank")


def differences(encoder, preset: str, chosen: dict, paper: dict, precision: str, train) -> list[str]:
    """List the differences from the paper of the preset, one line each."""
    lines = [f"{key} {chosen[key]} instead of {value}" for key, value in paper.items() if chosen[key] != value]
    size = getattr(encoder, "image_size", None)
    if size is not None and tuple(size) != (224, 224):
        lines.append(f"images of {size[0]}x{size[1]} pixels instead of 224x224")
    lines.append(
        f"precision {precision} instead of float16 with loss scaling; no moving average of the weights (the papers "
        "compute one and test the raw weights)"
    )
    if preset == "ibot-imagenet":
        lines.append("min_lr 1e-6 is BEiT's default; the paper does not state it")
        if encoder.dim not in PRESETS[preset]:
            lines.append(
                f"encoder width {encoder.dim}; the paper gives options for {', '.join(map(str, PRESETS[preset]))}, "
                "and the nearest are used"
            )
    if chosen["repeats"] > 1 and len(train) < 256:
        lines.append(f"an epoch has {len(train)} images, not a multiple of 256")
    return lines


def default_workers(device: torch.device) -> int:
    """Return the number of data processes: the machine's cores on a GPU, 0 on a CPU that is busy training."""
    if device.type != "cuda":
        return 0
    ranks = local_world_size(1)
    return min(10, max(1, (os.cpu_count() or 1) // ranks - 1))

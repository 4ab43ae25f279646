"""Fine-tuning for classification: the whole encoder and a linear head are trained, the encoder given is left as it was."""

from __future__ import annotations

import copy
import hashlib
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.evaluation import features
from maskwise.evaluation.finetune_data import TransferBatches
from maskwise.evaluation.gradients import everybodys, sum_gradients
from maskwise.evaluation.layer_decay import layer_groups
from maskwise.evaluation.report import Report
from maskwise.functional import draws
from maskwise.functional.errors import UserError

DROP, HEAD = 43, 44  # streams of keyed draws, beside those of functional.draws

DEIT = {
    "lr": 7.5e-6, "lr_per": 512, "batch_size": 768, "epochs": 1000, "weight_decay": 0.05, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5,
    "schedule": "epoch", "layer_decay": 1.0, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "rand_augment": "rand-m9-mstd0.5-inc1",
    "colour_jitter": 0.4, "erasing": 0.25, "repeats": 3, "head_scale": 1.0, "evaluate_every": 1,
}  # fmt: skip
BEIT = DEIT | {
    "lr": 4e-3, "lr_per": None, "batch_size": 1024, "warmup_epochs": 20, "warmup_lr": 0.0, "min_lr": 1e-6, "schedule": "step", "repeats": 1, "head_scale": 0.001,
}  # fmt: skip
# evaluation.md 4, attmask.md 5.6; width -> what depends on it
PRESETS = {
    "deit": DEIT,
    "simpool": DEIT,
    "ibot": DEIT,
    "attmask": DEIT | {"batch_size": 900, "epochs": 500, "evaluate_every": 50},
    "ibot-imagenet": {
        384: BEIT | {"layer_decay": 0.75, "epochs": 200}, 768: BEIT | {"layer_decay": 0.65, "epochs": 100, "drop_path": 0.2},
        1024: BEIT | {"layer_decay": 0.75, "epochs": 50, "drop_path": 0.4, "warmup_epochs": 5},
    },
}  # fmt: skip


class FineTuned(nn.Module):
    """Encoder and linear head: images [B, 3, H, W], int64 drop-path keys [B] -> logits [B, C] in float32."""

    def __init__(self, encoder: nn.Module, classes: int, *, head_scale: float = 1.0, seed: int = 0):
        super().__init__()
        self.encoder = encoder
        self.head = nn.utils.skip_init(nn.Linear, encoder.dim, classes)
        generator = torch.Generator().manual_seed(int(draws.mix(HEAD, seed)) & ((1 << 63) - 1))
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator).clamp_(-2, 2).mul_(head_scale)
            self.head.bias.zero_()

    def forward(self, images: Tensor, drop_key: Tensor | None = None) -> Tensor:
        """Images -> logits."""
        return self.head(self.encoder(images, attention=False, drop_key=drop_key).pooled.float())


def finetune(
    encoder, data: dict, world=None, *, preset: str = "deit", lr: float | None = None, batch_size: int | None = None, epochs: int | None = None,
    weight_decay: float | None = None, warmup_epochs: int | None = None, layer_decay: float | None = None, drop_path: float | None = None,
    mixup: float | None = None, cutmix: float | None = None, smoothing: float | None = None, rand_augment: str | None = None, erasing: float | None = None,
    repeats: int | None = None, evaluate_every: int | None = None, seed: int = 0, precision: str = "fp32", workers: int | None = None,
) -> Report:  # fmt: skip
    """Train a copy of the encoder with a new linear head on data["train"], score it on data["test"] -> Report, in per cent.

    preset: deit (= simpool, ibot: transfer), attmask, ibot-imagenet (layer decay by the encoder's width); every other option replaces
    the preset's and is listed as a difference; rand_augment "none" leaves it out. Random numbers are keyed; ranks share each batch.
    Numbers: top1, top5 of the best evaluated epoch on the test set, as published; best_epoch from 1; top1_last, top5_last. Raises
    UserError for options out of range. evaluation.md 4, attmask.md 5.6.
    """
    begin = time.perf_counter()
    chosen, paper = settings(encoder, preset, dict(
        lr=lr, batch_size=batch_size, epochs=epochs, weight_decay=weight_decay, warmup_epochs=warmup_epochs, layer_decay=layer_decay, drop_path=drop_path,
        mixup=mixup, cutmix=cutmix, smoothing=smoothing, rand_augment=rand_augment, erasing=erasing, repeats=repeats, evaluate_every=evaluate_every,
    ))  # fmt: skip
    check(encoder, chosen, data, precision, world)
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    device = next(encoder.parameters()).device
    classes = int(max(torch.as_tensor(data[role].labels).max() for role in ("train", "test"))) + 1
    tuned = copy.deepcopy(encoder).requires_grad_(True)
    backbone = getattr(tuned, "backbone", None)
    if getattr(backbone, "mask_token", None) is not None:
        backbone.mask_token = None  # nothing is hidden here
    if hasattr(backbone, "drop_path"):
        backbone.drop_path.rate = chosen["drop_path"]
    model = FineTuned(tuned, classes, head_scale=chosen["head_scale"], seed=seed).to(device)
    groups = layer_groups(model, None if hasattr(backbone, "stage_dims") else getattr(backbone, "depth", None), chosen["weight_decay"], chosen["layer_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, foreach=True)
    batches = TransferBatches(
        data["train"], encoder, batch_size=chosen["batch_size"], repeats=chosen["repeats"], rand_augment=chosen["rand_augment"],
        colour_jitter=chosen["colour_jitter"], erasing=chosen["erasing"], mixup=chosen["mixup"], cutmix=chosen["cutmix"], smoothing=chosen["smoothing"],
        classes=classes, seed=seed, rank=rank, world_size=size, workers=workers if workers is not None else default_workers(device),
    )  # fmt: skip
    rate = schedule(chosen, len(batches))
    best, best_epoch, corrupt, loss = (-1.0, -1.0), 0, {}, torch.zeros((), device=device)
    training = 0.0
    for epoch in range(chosen["epochs"]):
        model.train()
        start = time.perf_counter()
        for step, (images, targets, places) in enumerate(batches.epoch(epoch, device)):
            now = rate(epoch, step)
            for group in optimizer.param_groups:
                group["lr"] = now * group["lr_scale"]
            key = draws.mix(DROP, seed, epoch, places).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images, key)
            loss = -(targets * F.log_softmax(logits, dim=1)).sum() / chosen["batch_size"]
            optimizer.zero_grad()
            loss.backward()
            sum_gradients(model, world)
            optimizer.step()
        training += time.perf_counter() - start
        last = epoch + 1 == chosen["epochs"]
        if last or (epoch + 1) % chosen["evaluate_every"] == 0:
            score = accuracy(model, data["test"], world, precision, corrupt)
            if score[0] > best[0]:
                best, best_epoch = score, epoch + 1
    seconds = time.perf_counter() - begin
    seen = len(batches) * chosen["batch_size"] * chosen["epochs"]
    total = float(loss.detach() if world is None else world.all_sum(loss.detach()))
    prints = [features.fingerprint(data[role]) for role in ("train", "test")]
    return Report(
        numbers={
            "top1": best[0], "top5": best[1], "best_epoch": best_epoch, "top1_last": score[0], "top5_last": score[1],
            "loss_last_step": total,
        },
        protocol={
            "evaluation": "finetune", "preset": preset, **chosen, "optimizer": "adamw", "seed": seed, "precision": precision, "classes": classes,
            "train": len(data["train"]), "test": len(data["test"]), "steps_per_epoch": len(batches), "selection": "best evaluated epoch on the test set, as published",
            "differences": differences(encoder, preset, chosen, paper, precision, data["train"]),
        },
        data_hash=hashlib.sha256("".join(prints).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": seen, "images_per_second": round(seen / max(1e-9, training), 1), "device": str(device)},
        corrupt=everybodys({**batches.corrupt, **corrupt}, world),
    )  # fmt: skip


def schedule(chosen: dict, steps: int):
    """(epoch, step) -> learning rate of the head's layer.

    "epoch": DeiT's, timm's cosine moved one epoch behind, so that epochs 0 and 1 both train at warmup_lr; "step": BEiT's, linear
    from 0 and half a cosine over the remaining steps.
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
    """Top-1 and top-5 (or top-C) in per cent by the evaluation transform; ranks share the images."""
    labels, weight = torch.as_tensor(dataset.labels), model.head.weight
    hits = torch.zeros(3, dtype=torch.int64, device=weight.device)
    mine = torch.arange(len(dataset)) if world is None else torch.arange(world.rank, len(dataset), world.size)
    for index, _, seen in features.stream(model.encoder, dataset, rows=mine, precision=precision, corrupt=corrupt):
        with torch.no_grad():
            logits = model.head(seen.pooled.float())
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[index].to(weight.device)[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(index), device=weight.device)])
    if world is not None:
        hits = world.all_sum(hits)
    one, five, count = hits.tolist()
    return 100 * one / max(1, count), 100 * five / max(1, count)


def settings(encoder, preset: str, given: dict) -> tuple[dict, dict]:
    """(what is done, what the paper does)."""
    if preset not in PRESETS:
        raise UserError(f"finetune has no preset {preset!r}; there are {', '.join(PRESETS)}")
    paper = PRESETS[preset]
    if preset == "ibot-imagenet":
        paper = paper[min(paper, key=lambda width: (abs(width - encoder.dim), width))]
    return {**paper, **{key: value for key, value in given.items() if value is not None}}, paper


def check(encoder, chosen: dict, data: dict, precision: str, world) -> None:
    """Refuse what cannot be trained before any image is read."""
    features.check(encoder, ("pooled",), precision)
    for role in ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"finetune needs labels, and the {role} images have none; give a folder with one subfolder per class")
    for key in ("epochs", "batch_size", "repeats", "evaluate_every"):
        if not isinstance(chosen[key], int) or chosen[key] < 1:
            raise UserError(f"finetune: {key} is {chosen[key]}; it must be a whole number from 1")
    for key in ("lr", "layer_decay"):
        if not chosen[key] > 0:
            raise UserError(f"finetune: {key} is {chosen[key]}; it must be above 0")
    for key in ("drop_path", "smoothing", "erasing"):
        if not 0 <= chosen[key] < 1:
            raise UserError(f"finetune: {key} is {chosen[key]}; it must lie from 0 to below 1")
    size = 1 if world is None else world.size
    if chosen["batch_size"] % (2 * size):
        near = max(2 * size, chosen["batch_size"] // (2 * size) * 2 * size)
        raise UserError(f"finetune: batch_size {chosen['batch_size']} must divide by {2 * size} (two images are mixed, {size} ranks share the batch); give {near}")
    if chosen["warmup_epochs"] >= chosen["epochs"]:
        raise UserError(f"finetune: warmup_epochs {chosen['warmup_epochs']} is not shorter than the run of {chosen['epochs']} epochs; give warmup_epochs={max(0, chosen['epochs'] // 10)}")
    if size > 1 and any(isinstance(part, _BatchNorm) for part in encoder.modules()):
        raise UserError(f"finetune: batch norm is not synchronised between {size} ranks here; use one rank")


def differences(encoder, preset: str, chosen: dict, paper: dict, precision: str, train) -> list[str]:
    """What this run does otherwise than the paper whose name its preset bears, one line each."""
    lines = [f"{key} {chosen[key]} instead of {value}" for key, value in paper.items() if chosen[key] != value]
    size = getattr(encoder, "image_size", None)
    if size is not None and tuple(size) != (224, 224):
        lines.append(f"images of {size[0]}x{size[1]} pixels instead of 224x224")
    lines.append(f"precision {precision} instead of float16 with loss scaling; no moving average is kept (the papers keep one and test the raw weights)")
    if preset == "ibot-imagenet":
        lines.append("min_lr 1e-6 is BEiT's default; the paper does not state it")
        if encoder.dim not in PRESETS[preset]:
            lines.append(f"the encoder is {encoder.dim} wide; the paper gives options for {', '.join(map(str, PRESETS[preset]))}, and the nearest are taken")
    if chosen["repeats"] > 1 and len(train) < 256:
        lines.append(f"an epoch sees {len(train)} images, not a multiple of 256")
    return lines


def default_workers(device: torch.device) -> int:
    """Data processes: the machine's cores beside a GPU, none beside a CPU that is busy training."""
    import os

    return min(10, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)) if device.type == "cuda" else 0

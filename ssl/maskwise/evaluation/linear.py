"""Linear probing: linear classifiers on frozen features."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from maskwise.bounds import Count, NonNegative, Positive
from maskwise.data.class_matching import class_names
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.probes.batches import ProbeBatches
from maskwise.evaluation.probes.linear_heads import HeadSpec, LinearHeads
from maskwise.evaluation.protocol import Options, as_tuple, labeled_sets
from maskwise.evaluation.report import Report, joint_hash
from maskwise.evaluation.scoring.classifier import save_classifier
from maskwise.process.progress import counted

# 45 learning rates, 1e-4 to 9 (iBOT's evaluation/eval_linear_multi.py)
SWEEP = tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10))
WIDE = 768  # from this width on, the papers probe one block and the mean patch token instead of four blocks

# settings of each paper: (feature of a narrow encoder, of a wide one), then the options
PRESETS = {
    "dino": {"feature": ("cls4", "cls~patch_mean"), "lr": 0.001, "batch_size": 1024},
    "attmask": {"feature": ("cls4", "cls+patch_mean"), "lr": 0.005, "batch_size": 2048},
    "simpool": {"feature": ("pooled", "pooled"), "lr": 0.001, "batch_size": 1024},
    "ibot-sweep": {"feature": ("cls4", "cls+patch_mean"), "lr": SWEEP, "batch_size": 1024},
    "ibot-sweep-180": {
        "feature": ("cls4", "cls+patch_mean"),
        "lr": SWEEP,
        "batch_size": 1024,
        "weight_decay": (0.0, 1e-6),
        "optimizer": ("sgd", "lars"),
    },
}
COMMON = {"epochs": 100, "augment": True, "weight_decay": 0.0, "optimizer": "sgd"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearOptions(Options):
    """Options of linear probing; None means as in the preset.

    preset: dino, attmask, simpool, ibot-sweep or ibot-sweep-180 (default: simpool for an encoder without a class token,
    else dino). lr (per 256 images), weight_decay and optimizer ("sgd" or "lars") may be several: all combinations are
    trained at once. augment=False takes the features of the evaluation transform, computed once and cached in the
    folder `cache`, instead of new crops each epoch. save: a file for the best head.
    """

    evaluation = "linear"

    preset: str | None = None
    feature: str | None = None
    lr: Positive | Sequence[Positive] | None = None
    weight_decay: NonNegative | Sequence[NonNegative] | None = None
    optimizer: str | Sequence[str] | None = None
    batch_size: Count | None = None
    epochs: Count | None = None
    augment: bool | None = None
    evaluate_every: Count = 1
    seed: int = 0
    precision: str = "fp32"
    cache: object = None
    feature_batch: Count = 256
    save: object = None


PRESET_KEYS = ("feature", "lr", "weight_decay", "optimizer", "batch_size", "epochs", "augment")


def linear(encoder, data: dict, world=None, **options) -> Report:
    """Train linear classifiers on data["train"] and score them on data["test"] -> Report, accuracies in per cent.

    options: those of `LinearOptions`; the report lists what differs from the paper of the preset. SGD with momentum
    0.9, cosine per epoch to 0. Numbers: top1 and top5 of the best epoch and head on the test set, as published;
    top1_last and top5_last of the last epoch; best_epoch from 1; top1_<head> for several heads. Raises UserError for
    options out of range and for features that the encoder does not have.
    """
    begin, given = time.perf_counter(), LinearOptions(**options)
    chosen, paper, preset = settings(encoder, given.preset, {key: getattr(given, key) for key in PRESET_KEYS})
    names, specs = grid(chosen)
    check(chosen, specs)
    data = labeled_sets("linear", data, "train", "test")
    train, test = features_of(encoder, data, world, chosen, given)
    device = next(encoder.parameters()).device
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    heads = LinearHeads(specs, test[chosen["feature"]].shape[1], classes, seed=given.seed, device=device)
    best = train_heads(heads, train, test, chosen, given.evaluate_every)
    if best.head is None:
        raise UserError("every linear head diverged to non-finite weights; lower lr")
    if given.save and (world is None or world.is_main):
        save_classifier(best.head, chosen["feature"], given.save, (class_names(data["train"]) or [])[:classes])
    images = train.images + len(test)
    return Report(
        numbers=best.numbers(names, specs, chosen["batch_size"]),
        protocol={
            "evaluation": "linear",
            "preset": preset,
            **chosen,
            "lr_scaled_by": chosen["batch_size"] / 256,
            "momentum": 0.9,
            "schedule": "cosine per epoch to 0",
            "seed": given.seed,
            "precision": given.precision,
            "classes": classes,
            "train": len(train),
            "test": len(test),
            "evaluate_every": given.evaluate_every,
            "selection": f"best epoch{' and best head' if len(heads) > 1 else ''} on the test set, as published; "
            "_last: last epoch",
            "differences": differences(encoder, chosen, paper, train, classes, given.evaluate_every),
        },
        data_hash=joint_hash(train.hash, test.hash),
        cost={
            "seconds": round(time.perf_counter() - begin, 3),
            "images": images,
            "images_per_second": round(images / max(1e-9, train.seconds + test.seconds), 1),
            "probe_seconds": round(best.seconds, 3),
            "head_images_per_second": round(best.images * len(heads) / max(1e-9, best.seconds)),
            "device": str(device),
            "features": {"train": train.origin, "test": test.origin[chosen["feature"]]},
        },
        corrupt={**train.corrupt, **test.corrupt},
    )


def features_of(encoder, data: dict, world, chosen: dict, given: LinearOptions):
    """Return the training batches and the feature bank of the test images."""
    shared = {"world": world, "precision": given.precision, "cache": given.cache}
    feature = chosen["feature"]
    test = extract.extract(encoder, data["test"], feature, batch_size=given.feature_batch, **shared)
    train = ProbeBatches(
        encoder,
        data["train"],
        feature,
        batch_size=chosen["batch_size"],
        augment=chosen["augment"],
        seed=given.seed,
        feature_batch=given.feature_batch,
        **shared,
    )
    return train, test


class BestHeads:
    """Best test scores of T heads over the epochs, and the single best head."""

    def __init__(self, heads: LinearHeads):
        self.heads = heads
        self.top1 = torch.full((len(heads),), -1.0, dtype=torch.float64)
        self.top5, self.epoch = self.top1.clone(), torch.zeros(len(heads), dtype=torch.int64)
        self.last: torch.Tensor | None = None  # scores [T, 2] of the last epoch
        self.head: nn.Linear | None = None
        self.seconds, self.images = 0.0, 0  # training of the heads, without features

    def update(self, scores: torch.Tensor, epoch: int) -> None:
        """Take the scores [T, 2] after an epoch (counted from 1); NaN for heads that diverged."""
        top1 = torch.nan_to_num(scores[:, 0], nan=-1.0)
        better = top1 > self.top1
        if better.any() and top1.max() > self.top1.max():
            self.head = self.heads.head(int(top1.argmax()))
        self.top1 = torch.where(better, scores[:, 0], self.top1)
        self.top5 = torch.where(better, scores[:, 1], self.top5)
        self.epoch = torch.where(better, epoch, self.epoch)
        self.last = scores

    def numbers(self, names: list[str], specs: Sequence[HeadSpec], batch_size: int) -> dict:
        """Return the numbers of the report."""
        winner, last = int(self.top1.argmax()), int(torch.nan_to_num(self.last[:, 0], nan=-1.0).argmax())
        numbers = {
            "top1": float(self.top1[winner]),
            "top5": float(self.top5[winner]),
            "best_epoch": int(self.epoch[winner]),
            "top1_last": float(self.last[last, 0]),
            "top5_last": float(self.last[last, 1]),
        }
        if len(names) > 1:
            numbers |= {"best_lr": specs[winner].lr * 256 / batch_size, "heads": len(names)}
            by_head = zip(names, self.top1)
            numbers |= {f"top1_{name}": float(value) if value >= 0 else math.nan for name, value in by_head}
        return numbers


def train_heads(heads: LinearHeads, train: ProbeBatches, test, chosen: dict, evaluate_every: int) -> BestHeads:
    """Train the heads for all epochs, scoring them on the test bank."""
    best, epochs, device = BestHeads(heads), chosen["epochs"], heads.weight.device
    for epoch in counted(range(epochs), epochs, "epochs", "epoch"):
        factor = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        start, feature_seconds = time.perf_counter(), train.seconds
        for x, y in train.epoch(epoch):
            heads.step(x.to(device), y.to(device), factor)
            best.images += len(y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best.seconds += time.perf_counter() - start - (train.seconds - feature_seconds)
        if epoch + 1 == epochs or (epoch + 1) % evaluate_every == 0:
            best.update(heads.accuracy(test[chosen["feature"]], test.labels), epoch + 1)
    return best


def settings(encoder, preset: str | None, given: dict) -> tuple[dict, dict, str]:
    """Return (settings, the paper's settings, preset name): given options that are not None replace the preset's."""
    has_token = getattr(getattr(encoder, "backbone", None), "has_class_token", not hasattr(encoder, "feature_terms"))
    preset = preset or ("dino" if has_token else "simpool")
    if preset not in PRESETS:
        raise UserError(f"linear: no preset {preset!r}; choose from {', '.join(PRESETS)}")
    paper = {**COMMON, **PRESETS[preset]}
    paper["feature"] = paper["feature"][encoder.dim >= WIDE]
    return {**paper, **{key: value for key, value in given.items() if value is not None}}, paper, preset


def grid(chosen: dict) -> tuple[list[str], list[HeadSpec]]:
    """Return names and specs of all combinations of optimizer, weight decay and learning rate.

    The learning rate of a spec is scaled by batch / 256.
    """
    names, specs = [], []
    optimizers, decays, rates = (as_tuple(chosen[key]) for key in ("optimizer", "weight_decay", "lr"))
    for optimizer in optimizers:
        for decay in decays:
            for lr in rates:
                parts = [optimizer] if len(optimizers) > 1 else []
                parts += [f"wd{decay:g}"] if len(decays) > 1 else []
                names.append("_".join([*parts, f"lr{lr:g}"]))
                specs.append(HeadSpec(lr * chosen["batch_size"] / 256, decay, optimizer))
    return names, specs


def check(chosen: dict, specs: Sequence[HeadSpec]) -> None:
    """Raise UserError for settings that cannot be trained, before any image is read."""
    if not specs:
        raise UserError("linear: lr, weight_decay or optimizer is an empty list; give at least one of each")
    for spec in specs:
        if spec.optimizer not in ("sgd", "lars"):
            raise UserError(f"linear: optimizer {spec.optimizer!r} is unknown; choose sgd or lars")


def differences(
    encoder, chosen: dict, paper: dict, train: ProbeBatches, classes: int, evaluate_every: int
) -> list[str]:
    """List the differences from the paper of the preset, one line each."""
    lines = [
        f"{key} {shortened(chosen[key])} instead of {shortened(value)}"
        for key, value in paper.items()
        if chosen[key] != value and key != "augment"
    ]
    if paper["augment"] and not chosen["augment"]:
        lines.append(
            "frozen features of the evaluation transform, computed once, instead of random resized crops and flips "
            "each epoch"
        )
    if evaluate_every > 1:
        lines.append(f"scored every {evaluate_every} epochs instead of every one, so the best epoch is one of fewer")
    if isinstance(chosen["lr"], (tuple, list)) and len(chosen["lr"]) > 1:
        lines.append("all heads start from the same weights instead of each from its own")
    size = getattr(encoder, "image_size", None)
    if size is not None and tuple(size) != (224, 224):
        lines.append(f"images of {size[0]}x{size[1]} pixels instead of 224x224")
    if classes != 1000:
        lines.append(f"{len(train)} training images of {classes} classes instead of ImageNet-1k")
    return lines


def shortened(value) -> str:
    """Return a setting as text, a long list by its length."""
    return f"{len(value)} values" if isinstance(value, (tuple, list)) and len(value) > 4 else str(value)

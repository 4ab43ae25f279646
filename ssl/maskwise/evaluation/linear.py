"""Linear probing: how well classes can be told apart by a plane, the encoder frozen."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence

import torch

from maskwise.evaluation import features
from maskwise.evaluation.classifier import save_classifier
from maskwise.evaluation.linear_heads import HeadSpec, LinearHeads
from maskwise.evaluation.probe_batches import ProbeBatches
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError

SWEEP = tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10))  # 45 learning rates, 1e-4 to 9 (attmask.md 5.4)
WIDE = 768  # from this width on the papers probe one block and the mean patch instead of four blocks

# what each paper does (evaluation.md 3, attmask.md 5.3, 5.4): (feature of a narrow encoder, of a wide one), then the options
PRESETS = {
    "dino": {"feature": ("cls4", "cls~patch_mean"), "lr": 0.001, "batch_size": 1024},
    "attmask": {"feature": ("cls4", "cls+patch_mean"), "lr": 0.005, "batch_size": 2048},
    "simpool": {"feature": ("pooled", "pooled"), "lr": 0.001, "batch_size": 1024},
    "ibot-sweep": {"feature": ("cls4", "cls+patch_mean"), "lr": SWEEP, "batch_size": 1024},
    "ibot-sweep-180": {
        "feature": ("cls4", "cls+patch_mean"), "lr": SWEEP, "batch_size": 1024, "weight_decay": (0.0, 1e-6), "optimizer": ("sgd", "lars"),
    },
}  # fmt: skip
COMMON = {"epochs": 100, "augment": True, "weight_decay": 0.0, "optimizer": "sgd"}


def linear(
    encoder, data: dict, world=None, *, preset: str | None = None, feature: str | None = None, lr=None, weight_decay=None, optimizer=None,
    batch_size: int | None = None, epochs: int | None = None, augment: bool | None = None, evaluate_every: int = 1, seed: int = 0,
    precision: str = "fp32", cache=None, feature_batch: int = 256, save=None,
) -> Report:  # fmt: skip
    """Train linear classifiers on data["train"] and score them on data["test"] -> Report, accuracies in per cent.

    preset: dino, attmask, simpool, ibot-sweep or ibot-sweep-180 (default: simpool for an encoder without a class token, else dino);
    every other option replaces the preset's, and the report lists what differs from the paper. lr (per 256 images), weight_decay and
    optimizer ("sgd" or "lars") may be several: their product is trained at once on the same features. augment=False takes the
    features of the evaluation transform, computed once (kept in the folder `cache`, if given) instead of fresh crops each epoch.
    SGD with momentum .9, cosine per epoch to 0. Numbers: top1 and top5 of the best epoch and head on the test set, as published;
    top1_last and top5_last of the last epoch; best_epoch from 1; top1_<head> for several heads. save: a file for the best head.
    Raises UserError for options out of range and for features that the encoder does not have. evaluation.md 3.
    """
    begin = time.perf_counter()
    chosen, paper, preset = settings(encoder, preset, dict(
        feature=feature, lr=lr, weight_decay=weight_decay, optimizer=optimizer, batch_size=batch_size, epochs=epochs, augment=augment,
    ))  # fmt: skip
    names, specs = grid(chosen)
    check(chosen, specs, evaluate_every, data)
    feature, epochs, batch_size = chosen["feature"], chosen["epochs"], chosen["batch_size"]
    test = features.extract(encoder, data["test"], feature, world=world, batch_size=feature_batch, precision=precision, cache=cache)
    train = ProbeBatches(
        encoder, data["train"], feature, batch_size=batch_size, augment=chosen["augment"], seed=seed, world=world, feature_batch=feature_batch,
        precision=precision, cache=cache,
    )  # fmt: skip
    device = next(encoder.parameters()).device
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    heads = LinearHeads(specs, test[feature].shape[1], classes, seed=seed, device=device)
    best, scores, busy, seen, kept = torch.full((len(heads),), -1.0, dtype=torch.float64), None, 0.0, 0, None
    best_five, best_epoch = best.clone(), torch.zeros(len(heads), dtype=torch.int64)
    for epoch in range(epochs):
        factor = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        start, fetched = time.perf_counter(), train.seconds
        for x, y in train.epoch(epoch):
            heads.step(x.to(device), y.to(device), factor)
            seen += len(y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        busy += time.perf_counter() - start - (train.seconds - fetched)
        if epoch + 1 < epochs and (epoch + 1) % evaluate_every:
            continue
        scores = heads.accuracy(test[feature], test.labels)
        better = torch.nan_to_num(scores[:, 0], nan=-1.0) > best
        if better.any() and torch.nan_to_num(scores[:, 0], nan=-1.0).max() > best.max():
            kept = heads.head(int(torch.nan_to_num(scores[:, 0], nan=-1.0).argmax()))
        best, best_five = torch.where(better, scores[:, 0], best), torch.where(better, scores[:, 1], best_five)
        best_epoch = torch.where(better, epoch + 1, best_epoch)
    if kept is None:
        raise UserError("every linear head diverged to non-finite weights; lower lr")
    if save and (world is None or world.is_main):
        save_classifier(kept, feature, save)
    winner, last = int(best.argmax()), int(torch.nan_to_num(scores[:, 0], nan=-1.0).argmax())
    numbers = {
        "top1": float(best[winner]), "top5": float(best_five[winner]), "best_epoch": int(best_epoch[winner]),
        "top1_last": float(scores[last, 0]), "top5_last": float(scores[last, 1]),
    }  # fmt: skip
    if len(heads) > 1:
        numbers |= {"best_lr": specs[winner].lr * 256 / batch_size, "heads": len(heads)}
        numbers |= {f"top1_{name}": float(value) if value >= 0 else math.nan for name, value in zip(names, best)}
    seconds = time.perf_counter() - begin
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "linear", "preset": preset, **chosen, "lr_scaled_by": batch_size / 256, "momentum": 0.9, "schedule": "cosine per epoch to 0",
            "seed": seed, "precision": precision, "classes": classes, "train": len(train), "test": len(test), "evaluate_every": evaluate_every,
            "selection": "best epoch" + (" and best head" if len(heads) > 1 else "") + " on the test set, as published; _last beside it",
            "differences": differences(encoder, chosen, paper, train, classes, evaluate_every),
        },
        data_hash=hashlib.sha256((train.hash + test.hash).encode()).hexdigest(),
        cost={
            "seconds": round(seconds, 3), "images": train.images + len(test), "images_per_second": round((train.images + len(test)) / max(1e-9, train.seconds + test.seconds), 1),
            "probe_seconds": round(busy, 3), "head_images_per_second": round(seen * len(heads) / max(1e-9, busy)), "device": str(device),
            "features": {"train": train.origin, "test": test.origin[feature]},
        },
        corrupt={**train.corrupt, **test.corrupt},
    )  # fmt: skip


def settings(encoder, preset: str | None, given: dict) -> tuple[dict, dict, str]:
    """(what is done, what the paper does, the preset's name): options that are not None replace the preset's."""
    has_token = getattr(getattr(encoder, "backbone", None), "has_class_token", True)
    preset = preset or ("dino" if has_token else "simpool")
    if preset not in PRESETS:
        raise UserError(f"linear has no preset {preset!r}; there are {', '.join(PRESETS)}")
    paper = {**COMMON, **PRESETS[preset]}
    paper["feature"] = paper["feature"][encoder.dim >= WIDE]
    return {**paper, **{key: value for key, value in given.items() if value is not None}}, paper, preset


def grid(chosen: dict) -> tuple[list[str], list[HeadSpec]]:
    """Names and specs of the heads: the product of optimizers, weight decays and learning rates, the rates scaled by batch / 256."""
    names, specs = [], []
    optimizers, decays, rates = (_several(chosen[key]) for key in ("optimizer", "weight_decay", "lr"))
    for optimizer in optimizers:
        for decay in decays:
            for lr in rates:
                name = "_".join([*([optimizer] if len(optimizers) > 1 else []), *([f"wd{decay:g}"] if len(decays) > 1 else []), f"lr{lr:g}"])
                names.append(name)
                specs.append(HeadSpec(lr * chosen["batch_size"] / 256, decay, optimizer))
    return names, specs


def check(chosen: dict, specs: Sequence[HeadSpec], evaluate_every: int, data: dict) -> None:
    """Refuse what cannot be trained before any image is read."""
    for key in ("epochs", "batch_size"):
        if not isinstance(chosen[key], int) or chosen[key] < 1:
            raise UserError(f"linear: {key} is {chosen[key]}; it must be a whole number from 1")
    if not isinstance(evaluate_every, int) or evaluate_every < 1:
        raise UserError(f"linear: evaluate_every is {evaluate_every}; it must be a whole number of epochs from 1")
    for spec in specs:
        if spec.optimizer not in ("sgd", "lars"):
            raise UserError(f"linear: optimizer {spec.optimizer!r} is unknown; choose sgd or lars")
        if not spec.lr > 0 or spec.weight_decay < 0:
            raise UserError(f"linear: lr must be above 0 and weight_decay at least 0, not {spec.lr * 256 / chosen['batch_size']:g} and {spec.weight_decay:g}")
    for role in ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"linear needs labels, and the {role} images have none; give a folder with one subfolder per class")


def differences(encoder, chosen: dict, paper: dict, train: ProbeBatches, classes: int, evaluate_every: int) -> list[str]:
    """What this run does otherwise than the paper whose name its preset bears, one line each."""
    lines = []
    for key, value in paper.items():
        if chosen[key] != value and key != "augment":
            said = [f"{len(_several(one))} values" if isinstance(one, (tuple, list)) and len(one) > 4 else str(one) for one in (chosen[key], value)]
            lines.append(f"{key} {said[0]} instead of {said[1]}")
    if paper["augment"] and not chosen["augment"]:
        lines.append("frozen features of the evaluation transform, computed once, instead of random resized crops and flips each epoch")
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


def _several(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)

"""IN-9, the Backgrounds Challenge: what a classifier makes of foregrounds and backgrounds taken apart."""

from __future__ import annotations

import hashlib
import time

import torch
from torch import Tensor

from maskwise.data.layouts import imagenet, in9
from maskwise.evaluation.judge import Judge, differences, judge
from maskwise.evaluation.report import Report
from maskwise.evaluation.robustness import in9_accuracy
from maskwise.evaluation.views import Whole
from maskwise.functional.errors import UserError


def backgrounds(
    encoder, data: dict, world=None, *, classifier=None, probe=None, to_in9=None, k: int = 20, temperature: float = 0.07, feature: str = "pooled",
    batch_size: int = 256, cache=None,
) -> Report:  # fmt: skip
    """Accuracy on every variant of IN-9 in data, and bg_gap = mixed_same - mixed_rand -> Report, in per cent.

    data: {variant: images with labels 0..8}, and "train" for a k-NN bank where no probe is handed. Images are not cropped, and those
    of the encoder's size not resized. The arg-max is over all the classes of the classifier; one outside IN-9 is wrong. to_in9: a
    map file for other classes than ImageNet's. Raises UserError where no map fits. evaluation.md 7, attmask.md 5.9.
    """
    begin = time.perf_counter()
    variants = {name: data[name] for name in in9.VARIANTS if name in data}
    if not variants:
        raise UserError("IN-9: no variants given; give test=FOLDER that holds original/val, mixed_same/val and the others")
    judging = judge(encoder, data, classifier, probe=probe, world=world, k=k, temperature=temperature, feature=feature, batch_size=batch_size, cache=cache)
    table = class_map(judging, to_in9)
    view = Whole(tuple(judging.encoder.image_size))
    numbers, corrupt, hashes, images = {}, dict(judging.corrupt), [], 0
    for name, found in variants.items():
        seen = judging(found, view)
        numbers[name] = in9_accuracy(seen.scores, seen.labels, table)
        corrupt |= {f"{name}/{file}": reason for file, reason in seen.corrupt.items()}
        hashes.append(seen.hash)
        images += len(seen.labels)
    if {"mixed_same", "mixed_rand"} <= numbers.keys():
        numbers["bg_gap"] = numbers["mixed_same"] - numbers["mixed_rand"]
    seconds = time.perf_counter() - begin
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "backgrounds", **judging.about, "arg-max": "over all classes", "mapped": int((table >= 0).sum()),
            "map": "given" if to_in9 else "standard", "preset": "attmask",
            "differences": differences(judging, "the ImageNet linear probe (best epoch)"), "missing": [name for name in in9.VARIANTS if name not in variants], "resize": "none at this size",
        },
        data_hash=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": images, "images_per_second": round(images / seconds, 1), "device": str(next(encoder.parameters()).device)},
        corrupt=corrupt,
    )  # fmt: skip


backgrounds.needs = ()
backgrounds.readers = {"test": in9.read}


def class_map(judging: Judge, to_in9=None) -> Tensor:
    """Class of the classifier -> super-class 0..8 or -1, int64 [C]. Raises UserError where none fits."""
    if to_in9 is not None:
        table = in9.read_map(to_in9)
        place = imagenet.indices(judging.classes)
        if len(table) == judging.count:
            return table
        if len(table) != 1000 or place is None:
            raise UserError(f"IN-9: the classifier knows {judging.count} classes and the map {len(table)}; give a map for these classes")
        return table[place]
    place = torch.arange(1000) if judging.count == 1000 and judging.classes is None else imagenet.indices(judging.classes)
    if place is None:
        raise UserError("IN-9: the classifier's classes are not ImageNet's; give to_in9=FILE, a JSON map from class number to 0..8 or -1")
    return in9.standard_map()[place]

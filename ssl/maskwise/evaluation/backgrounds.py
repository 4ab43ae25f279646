"""IN-9, the Backgrounds Challenge: accuracy with changed foregrounds and backgrounds."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from maskwise.data.benchmark_sets import imagenet, in9
from maskwise.errors import UserError
from maskwise.evaluation.features.views import ResizeCenter
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.evaluation.robustness import in9_accuracy
from maskwise.evaluation.scoring.scorer import Scorer, ScorerOptions, differences, scorer_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundsOptions(ScorerOptions):
    """Options of IN-9; to_in9: a map file for classes other than ImageNet's."""

    evaluation = "backgrounds"

    to_in9: object = None


def backgrounds(encoder, data: dict, world=None, **options) -> Report:
    """Score every variant of IN-9 in data, and bg_gap = mixed_same - mixed_rand -> Report, in per cent.

    options: those of `BackgroundsOptions`. data: {variant: images with labels 0..8}, and "train" for a k-NN bank
    without a probe. Images are not cropped, and those of the encoder's size not resized. The arg-max is over all
    classes of the classifier; one outside IN-9 is wrong. Raises UserError if no class map fits.
    """
    begin, chosen = time.perf_counter(), BackgroundsOptions(**options)
    variants = {name: data[name] for name in in9.VARIANTS if name in data}
    if not variants:
        raise UserError(
            "IN-9: no variants given; give test=FOLDER that holds original/val, mixed_same/val and the others"
        )
    scorer = scorer_of(encoder, data, chosen, world)
    table = class_map(scorer, chosen.to_in9)
    view = ResizeCenter(tuple(scorer.encoder.image_size))
    numbers, corrupt, hashes, images = {}, dict(scorer.corrupt), [], 0
    for name, dataset in variants.items():
        scored = scorer.score(dataset, view)
        numbers[name] = in9_accuracy(scored.scores, scored.labels, table)
        corrupt |= {f"{name}/{file}": reason for file, reason in scored.corrupt.items()}
        hashes.append(scored.hash)
        images += len(scored.labels)
    if {"mixed_same", "mixed_rand"} <= numbers.keys():
        numbers["bg_gap"] = numbers["mixed_same"] - numbers["mixed_rand"]
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "backgrounds",
            **scorer.about,
            "arg-max": "over all classes",
            "mapped": int((table >= 0).sum()),
            "map": "given" if chosen.to_in9 else "standard",
            "preset": "attmask",
            "differences": differences(scorer, "the ImageNet linear probe (best epoch)"),
            "missing": [name for name in in9.VARIANTS if name not in variants],
            "resize": "none at this size",
        },
        data_hash=joint_hash(*hashes),
        cost=cost(begin, images, next(encoder.parameters()).device),
        corrupt=corrupt,
    )


def class_map(scorer: Scorer, to_in9=None) -> Tensor:
    """Map classes of the classifier to super-classes 0..8 or -1 -> int64 [C]. Raises UserError if no map fits."""
    if to_in9 is not None:
        table = in9.read_map(to_in9)
        place = imagenet.indices(scorer.classes)
        if len(table) == scorer.count:
            return table
        if len(table) != 1000 or place is None:
            raise UserError(
                f"IN-9: the classifier has {scorer.count} classes and the map {len(table)}; give a map for these "
                "classes"
            )
        return table[place]
    unnamed = scorer.count == 1000 and scorer.classes is None
    place = torch.arange(1000) if unnamed else imagenet.indices(scorer.classes)
    if place is None:
        raise UserError(
            "IN-9: the classifier's classes are not ImageNet's; give to_in9=FILE, a JSON map from class number to 0..8 "
            "or -1"
        )
    return in9.standard_map()[place]

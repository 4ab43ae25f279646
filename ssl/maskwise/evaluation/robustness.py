"""Accuracy under distribution shift: IN-9 super-classes, ImageNet-R, ImageNet-V2, ReaL labels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.benchmark_sets import imagenet, in9
from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.labels import why_unlabeled
from maskwise.errors import UserError
from maskwise.evaluation.protocol import labeled_sets
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.evaluation.scoring.scorer import Scored, Scorer, ScorerOptions, differences, scorer_of, top1


def in9_accuracy(logits: Tensor, labels: Tensor, table: Tensor | None = None) -> float:
    """Return the share of images predicted in their super-class: [B, C], int64 [B] in 0..8 -> per cent.

    The arg-max is over all logits; a class outside IN-9 is wrong. table: class -> super-class or -1, by default that of
    ImageNet's 1000 classes. Raises UserError where it does not fit the logits.
    """
    table = in9.standard_map() if table is None else table
    if logits.shape[1] != len(table):
        raise UserError(
            f"IN-9: the classifier has {logits.shape[1]} classes and the map {len(table)}; give a map (in_to_in9.json) "
            "for these classes"
        )
    predicted = table.to(logits.device)[logits.argmax(dim=1)]
    return 100.0 * float((predicted == labels.to(logits.device)).double().mean())


def real_accuracy(scores: Tensor, sets: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Return top-1 against label sets in per cent, and the number of images with labels; the others are skipped."""
    best = scores.argmax(dim=1).tolist()
    right = [predicted in labels for predicted, labels in zip(best, sets) if len(labels)]
    return 100.0 * sum(right) / max(1, len(right)), len(right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustnessOptions(ScorerOptions):
    """Options of robustness.

    imagenet_r, imagenet_v2: folders with one subfolder per class (WordNet ids, or numbers 0..999); real: ReaL label
    sets of the test images (JSON).
    """

    evaluation = "robustness"

    imagenet_r: object = None
    imagenet_v2: object = None
    real: object = None


def robustness(encoder, data: dict, world=None, **options) -> Report:
    """Score data["test"] and sets that share its classes -> Report with top-1 and drop, in per cent.

    options: those of `RobustnessOptions`; the classifier is a probe, else k-NN votes of data["train"]. Scores are
    restricted to the classes of each set, and the drop is measured from the test images of these classes under the same
    restriction. With ReaL labels, a prediction in the set is right and images with an empty set are skipped.
    """
    begin, chosen = time.perf_counter(), RobustnessOptions(**options)
    data = labeled_sets("robustness", data, "test")
    folders = {"imagenet_r": chosen.imagenet_r, "imagenet_v2": chosen.imagenet_v2}
    sets = {name: _folder(name, given, len(encoder.mean)) for name, given in folders.items() if given is not None}
    named = ("train", "test", *folders)
    sets |= {name: images for name, images in data.items() if name not in named and hasattr(images, "image")}
    label_sets = None if chosen.real is None else imagenet.real_labels(chosen.real, data["test"])
    if not sets and label_sets is None:
        raise UserError(
            "robustness: no set to compare with the test images; give imagenet_r=FOLDER, imagenet_v2=FOLDER or "
            "real=FILE"
        )
    scorer = scorer_of(encoder, data, chosen, world)
    columns = {name: scorer.columns(name, images) for name, images in sets.items()}
    clean = scorer.score(data["test"])
    truth = scorer.columns("test", data["test"])[clean.labels]
    numbers, counts = {"top1": top1(clean.scores, truth)}, {"test": len(truth)}
    corrupt, hashes = {**scorer.corrupt, **clean.corrupt}, [clean.hash]
    for name, images in sets.items():
        shifted = scorer.score(images)
        numbers |= shift_numbers(name, shifted, columns[name], clean, truth)
        counts[name] = len(shifted.labels)
        corrupt |= shifted.corrupt
        hashes.append(shifted.hash)
    if label_sets is not None:
        sets_of_images = [label_sets[i] for i in clean.index.tolist()]
        numbers["real_top1"], counts["real"] = real_accuracy(imagenet_scores(scorer, clean.scores), sets_of_images)
    return Report(
        numbers=numbers,
        protocol={
            "evaluation": "robustness",
            **scorer.about,
            "images": counts,
            "restricted": "to the classes of each set",
            "preset": "map",
            "differences": differences(scorer, "a classifier trained on ImageNet"),
        },
        data_hash=joint_hash(*hashes),
        cost=cost(begin, sum(counts.values()), next(encoder.parameters()).device),
        corrupt=corrupt,
    )


def shift_numbers(name: str, shifted: Scored, columns: Tensor, clean: Scored, truth: Tensor) -> dict[str, float]:
    """Return top-1 on a shifted set, on the clean images of its classes, and the drop."""
    present = torch.unique(columns[columns >= 0])
    numbers = {f"{name}_top1": top1(restricted(shifted.scores, present), columns[shifted.labels])}
    same = torch.isin(truth, present)
    if bool(same.any()):
        numbers[f"{name}_clean_top1"] = top1(restricted(clean.scores[same], present), truth[same])
        numbers[f"{name}_drop"] = numbers[f"{name}_clean_top1"] - numbers[f"{name}_top1"]
    return numbers


def restricted(scores: Tensor, columns: Tensor) -> Tensor:
    """Set all scores [n, C] outside some columns to -inf."""
    masked = torch.full_like(scores, -float("inf"))
    masked[:, columns] = scores[:, columns]
    return masked


def imagenet_scores(scorer: Scorer, scores: Tensor) -> Tensor:
    """Spread scores [n, C] over ImageNet's 1000 classes, -inf elsewhere. Raises UserError for other class names."""
    columns = imagenet.indices(scorer.classes)
    if columns is None and scores.shape[1] == 1000:
        columns = torch.arange(1000)
    if columns is None:
        raise UserError(
            "ReaL labels are ImageNet indices and the classifier's classes are not WordNet ids; name the class "
            "folders by them"
        )
    spread = torch.full((len(scores), 1000), -float("inf"), dtype=scores.dtype)
    spread[:, columns] = scores
    return spread


def _folder(name: str, given, channels: int):
    images = Folder(Path(given), channels=channels) if isinstance(given, (str, Path)) else given
    if images.labels is None:
        raise UserError(f"{name}: {why_unlabeled(images, 'the images')}")
    return images

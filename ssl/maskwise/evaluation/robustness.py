"""Accuracy where the images or the labels are other ones: IN-9's nine classes, ImageNet-R, V2, ReaL, and what is lost there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.datasets import Folder
from maskwise.data.layouts import imagenet, in9
from maskwise.evaluation.judge import differences, judge, top1
from maskwise.evaluation.report import Report
from maskwise.functional.errors import UserError


def in9_accuracy(logits: Tensor, labels: Tensor, table: Tensor | None = None) -> float:
    """Share of images whose most likely class belongs to their super-class: [B, C], int64 [B] in 0..8 -> per cent.

    The arg-max is over all logits; a class outside IN-9 is wrong. table: class -> super-class or -1, by default that of ImageNet's
    1000 classes. Raises UserError where it does not fit the logits. evaluation.md 7.
    """
    table = in9.standard_map() if table is None else table
    if logits.shape[1] != len(table):
        raise UserError(f"IN-9: the classifier knows {logits.shape[1]} classes and the map {len(table)}; give a map (in_to_in9.json) for these classes")
    found = table.to(logits.device)[logits.argmax(dim=1)]
    return 100.0 * float((found == labels.to(logits.device)).double().mean())


def real_accuracy(scores: Tensor, sets: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Share of images whose most likely class is among their labels, in per cent, and how many have labels; the others are skipped."""
    best = scores.argmax(dim=1).tolist()
    right = [found in labels for found, labels in zip(best, sets) if len(labels)]
    return 100.0 * sum(right) / max(1, len(right)), len(right)


def robustness(
    encoder, data: dict, world=None, *, imagenet_r=None, imagenet_v2=None, real=None, classifier=None, probe=None, k: int = 20, temperature: float = 0.07,
    feature: str = "pooled", batch_size: int = 256, cache=None,
) -> Report:  # fmt: skip
    """Top-1 of data["test"] and of sets that share its classes, and the drop -> Report, in per cent.

    imagenet_r, imagenet_v2: folders with one subfolder a class (WordNet ids, or numbers 0..999); scores are restricted to the
    classes that are there, and the drop is measured from test images of these classes under the same restriction. real: ReaL label
    sets of the test images (JSON); a prediction in the set is right, images with an empty set are skipped. classifier: a probe; else
    the k-NN votes of data["train"]. evaluation.md 13.
    """
    begin = time.perf_counter()
    if data.get("test") is None or data["test"].labels is None:
        raise UserError("robustness needs labelled test images; give test=FOLDER with one subfolder per class")
    asked = {"imagenet_r": imagenet_r, "imagenet_v2": imagenet_v2}
    sets = {name: _folder(name, given) for name, given in asked.items() if given is not None}
    sets |= {name: found for name, found in data.items() if name not in ("train", "test", *asked) and hasattr(found, "image")}
    labels_of = None if real is None else imagenet.real_labels(real, data["test"])
    if not sets and labels_of is None:
        raise UserError("robustness has nothing beside the test images; give imagenet_r=FOLDER, imagenet_v2=FOLDER or real=FILE")
    judging = judge(encoder, data, classifier, probe=probe, world=world, k=k, temperature=temperature, feature=feature, batch_size=batch_size, cache=cache)
    wanted = {name: judging.columns(name, found) for name, found in sets.items()}
    clean = judging(data["test"])
    truth = judging.columns("test", data["test"])[clean.labels]
    numbers, corrupt, hashes = {"top1": top1(clean.scores, truth)}, {**judging.corrupt, **clean.corrupt}, [clean.hash]
    counts = {"test": len(truth)}
    for name, found in sets.items():
        seen = judging(found)
        columns = torch.unique(wanted[name])
        numbers[f"{name}_top1"] = top1(restricted(seen.scores, columns), wanted[name][seen.labels])
        same = torch.isin(truth, columns)
        if bool(same.any()):
            numbers[f"{name}_clean_top1"] = top1(restricted(clean.scores[same], columns), truth[same])
            numbers[f"{name}_drop"] = numbers[f"{name}_clean_top1"] - numbers[f"{name}_top1"]
        counts[name], corrupt, hashes = len(seen.labels), {**corrupt, **seen.corrupt}, [*hashes, seen.hash]
    if labels_of is not None:
        place = _standard(judging, len(clean.scores[0]))
        spread = torch.full((len(clean.scores), 1000), -float("inf"), dtype=clean.scores.dtype)
        spread[:, place] = clean.scores
        numbers["real_top1"], counts["real"] = real_accuracy(spread, [labels_of[i] for i in clean.index.tolist()])
    seconds = time.perf_counter() - begin
    return Report(
        numbers=numbers,
        protocol={"evaluation": "robustness", **judging.about, "images": counts, "restricted": "to the classes of each set", "preset": "map", "differences": differences(judging, "a classifier trained on ImageNet")},
        data_hash=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        cost={"seconds": round(seconds, 3), "images": sum(counts.values()), "device": str(next(encoder.parameters()).device)},
        corrupt=corrupt,
    )


robustness.needs = ("test",)


def restricted(scores: Tensor, columns: Tensor) -> Tensor:
    """Scores [n, C] with all but some columns out of the race."""
    kept = torch.full_like(scores, -float("inf"))
    kept[:, columns] = scores[:, columns]
    return kept


def _standard(judging, count: int) -> Tensor:
    place = imagenet.indices(judging.classes)
    if place is None and count == 1000:
        place = torch.arange(1000)
    if place is None:
        raise UserError("ReaL labels are ImageNet indices and the classifier's classes are not WordNet ids; name the class folders by them")
    return place


def _folder(name: str, given):
    found = Folder(Path(given)) if isinstance(given, (str, Path)) else given
    if found.labels is None:
        raise UserError(f"{name}: {given} has no class folders; give one subfolder per class")
    return found

"""Classifier of the protocols: k-NN over a feature bank, or a given linear probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from maskwise.bounds import Count, Positive
from maskwise.data.benchmark_sets import imagenet
from maskwise.data.class_matching import class_names, match_classes, present_classes
from maskwise.data.datasets.files import join_names
from maskwise.data.datasets.labels import why_unlabeled
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.knn import nearest, votes
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.scoring.classifier import load_classifier


@dataclasses.dataclass
class Scored:
    """Scores [n, C] of a dataset's readable images, in order, with labels int64 [n] or None and index int64 [n]."""

    scores: Tensor
    labels: Tensor | None
    index: Tensor
    hash: str
    corrupt: dict[str, str]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Options):
    """Options of a given classifier (`.encoder`, `.head`, `.feature`) or probe (`evaluate linear ... save=FILE`)."""

    classifier: object = None
    probe: object = None
    batch_size: Count = 256
    cache: object = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerOptions(ClassifierOptions):
    """Options of protocols that score by classifier or probe; without either, by k-NN votes of data["train"]."""

    k: Count = 20
    temperature: Positive = 0.07
    feature: str = "pooled"


@dataclasses.dataclass
class Scorer:
    """An encoder with a classifier of its features: `score` maps an image set to scores [n, C].

    classify: features [n, F] -> scores [n, C]; count: C; classes: their names, or None; about: entries of the protocol.
    """

    encoder: object
    feature: str
    classify: Callable[[Tensor], Tensor]
    count: int
    classes: list[str] | None
    about: dict
    corrupt: dict
    options: dict

    def score(self, dataset, view=None) -> Scored:
        """Score every readable image of a dataset, transformed by `view` or by the encoder's transform."""
        options = dict(self.options)
        if view is not None and not hasattr(view, "fingerprint"):
            options["cache"] = None
        bank = extract.extract(self.encoder, dataset, self.feature, view=view, **options)
        scores = self.classify(bank[self.feature])
        return Scored(scores, bank.labels, bank.index, bank.hash, bank.corrupt, bank.seconds)

    def columns(self, what: str, dataset) -> Tensor:
        """Return the score column of each class of a dataset, by name, int64 [C].

        -1 for a class without images that the classifier does not know. Numbers are compared where the classifier or
        the images have no class names. Raises UserError for images of a class without a column.
        """
        names, (labels, present) = class_names(dataset), present_classes(dataset)
        count = max(len(names or ()), int(labels.max()) + 1)
        if names is not None and self.classes is not None:
            columns = torch.full((count,), -1, dtype=torch.int64)
            columns[: len(names)] = match_classes(names, self.classes)
            columns[labels] = match_classes(present, self.classes)
            unknown = [name for name, column in zip(present, columns[labels].tolist()) if column < 0]
            if unknown:
                raise UserError(
                    f"{what}: {len(unknown)} of its {len(present)} classes are unknown to the classifier "
                    f"({join_names(unknown, 3)}); give its class folders the names of the training classes"
                )
            return columns
        if count > self.count:
            raise UserError(f"{what}: {count} classes, and the classifier has {self.count}; give one for these classes")
        if names is not None and count < self.count:
            raise UserError(
                f"{what}: {count} classes, and the classifier has {self.count} without names; give train=FOLDER, the "
                "images that it was trained on, whose class names it takes"
            )
        return torch.arange(count)


def scorer_of(encoder, data: dict, options: ClassifierOptions, world=None) -> Scorer:
    """Return the scorer of a given classifier or probe file, else of k-NN votes of data["train"].

    Raises UserError where there is none of them.
    """
    shared = {"world": world, "batch_size": options.batch_size, "cache": options.cache}
    classifier = load_classifier(encoder, options.probe) if options.probe is not None else options.classifier
    if classifier is not None:
        return classifier_scorer(classifier, class_names(data.get("train")), shared)
    return knn_scorer(encoder, data.get("train"), options, shared)


def classifier_scorer(classifier, names: list[str] | None, shared: dict) -> Scorer:
    """Return the scorer of a trained classifier; names: of the training classes, used if as many."""
    device = next(classifier.encoder.parameters()).device
    head = classifier.head.to(device).eval()

    def classify(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([head(part.to(device).float()).float().cpu() for part in rows.split(4096)])

    count = getattr(classifier, "count", None) or len(next(reversed(list(head.parameters()))))
    names = getattr(classifier, "classes", None) or (names if names and len(names) == count else None)
    names = names or (list(imagenet.synsets()) if count == 1000 else None)
    kind = getattr(classifier, "kind", "linear probe")
    about = {"classifier": kind, "feature": classifier.feature, "classes": count}
    return Scorer(classifier.encoder, classifier.feature, classify, count, names, about, {}, shared)


def knn_scorer(encoder, train, options: ScorerOptions, shared: dict) -> Scorer:
    """Return the scorer of k-NN votes of labeled training images. Raises UserError without labels."""
    if train is None or train.labels is None:
        reason = "" if train is None else f" ({why_unlabeled(train, 'the training images')})"
        raise UserError(
            f"this evaluation needs a classifier: give labeled train images for a k-NN bank{reason}, or a probe "
            "(`evaluate linear ... save=FILE`)"
        )
    feature, world = options.feature, shared["world"]
    bank = extract.extract(encoder, train, feature, **shared)
    device, rows, labels = next(encoder.parameters()).device, bank[feature], bank.labels
    names, k = class_names(train), min(options.k, len(bank))
    count = max(len(names or ()), int(labels.max()) + 1)

    def classify(queries: Tensor) -> Tensor:
        mine = queries if world is None else queries.tensor_split(world.size)[world.rank]
        similarity, index = nearest(rows, mine, k, device)
        scores = votes(similarity, labels.to(device)[index], count, options.temperature).cpu()
        return scores if world is None else world.gather(scores)

    about = {"classifier": "k-NN", "k": k, "temperature": options.temperature, "feature": feature}
    about |= {"bank": len(rows), "bank_hash": bank.hash, "classes": count}
    return Scorer(encoder, feature, classify, count, names, about, bank.corrupt, shared)


def differences(scorer: Scorer, probe: str) -> list[str]:
    """List the differences of a scorer from the published one, whose classifier is `probe`."""
    kind = scorer.about["classifier"]
    if kind == "k-NN":
        return [f"k-NN votes of {scorer.about['bank']} training images instead of {probe}"]
    if kind != "linear probe":
        return [f"{kind} classifier instead of {probe}"]
    return [] if scorer.count == 1000 else [f"a linear probe of {scorer.count} classes instead of 1000"]


def top1(scores: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest score is the label's, in per cent; the first of equal scores counts."""
    if not len(labels):
        return float("nan")
    return 100.0 * float((scores.argmax(dim=1) == labels.to(scores.device)).double().mean())

"""What names the class of an image for the protocols that need a classifier: the votes of a k-NN bank, or a probe that is handed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from maskwise.data.layouts import imagenet
from maskwise.evaluation import features
from maskwise.evaluation.classifier import load_classifier
from maskwise.evaluation.knn import nearest, votes
from maskwise.functional.errors import UserError


@dataclasses.dataclass
class Scored:
    """Scores [n, C] of a dataset's readable images in its order, labels int64 [n] or None, index int64 [n], hash, corrupt, seconds."""

    scores: Tensor
    labels: Tensor | None
    index: Tensor
    hash: str
    corrupt: dict[str, str]
    seconds: float


@dataclasses.dataclass
class Judge:
    """An encoder with something that scores its features: feature [n, F] -> [n, C]; classes: their names, or None; about: its protocol."""

    encoder: object
    feature: str
    score: Callable[[Tensor], Tensor]
    count: int
    classes: list[str] | None
    about: dict
    corrupt: dict
    options: dict

    def __call__(self, dataset, view=None) -> Scored:
        """Scores of every readable image of a dataset, seen by `view` or by the encoder's transform."""
        options = {**self.options, "cache": None} if view is not None and not hasattr(view, "fingerprint") else self.options
        bank = features.extract(self.encoder, dataset, self.feature, view=view, **options)
        return Scored(self.score(bank[self.feature]), bank.labels, bank.index, bank.hash, bank.corrupt, bank.seconds)

    def columns(self, what: str, dataset) -> Tensor:
        """Which of the scores each class of a dataset is -> int64 [C of the dataset]; raises UserError for a class without one."""
        if dataset.classes is None or self.classes is None:
            count = len(dataset.classes) if dataset.classes else int(dataset.labels.max()) + 1
            if count > self.count:
                raise UserError(f"{what}: {count} classes, and the classifier knows {self.count}; give one for these classes")
            return torch.arange(count)
        return imagenet.columns(what, dataset.classes, self.classes)


def judge(
    encoder, data: dict, classifier=None, *, probe=None, world=None, k: int = 20, temperature: float = 0.07, feature: str = "pooled", batch_size: int = 256,
    cache=None,
) -> Judge:  # fmt: skip
    """A handed classifier (`.encoder`, `.head`, `.feature`), the one of a `probe` file, or else the k-NN votes of data["train"].

    Raises UserError where there is neither.
    """
    options = {"world": world, "batch_size": batch_size, "cache": cache}
    train = data.get("train")
    names = getattr(train, "classes", None)
    if probe is not None:
        classifier = load_classifier(encoder, probe)
    if classifier is not None:
        device = next(classifier.encoder.parameters()).device
        head = classifier.head.to(device).eval()

        def probe(rows: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.cat([head(part.to(device).float()).float().cpu() for part in rows.split(4096)])

        count = getattr(classifier, "count", None) or len(next(reversed(list(head.parameters()))))
        names = getattr(classifier, "classes", None) or (names if names and len(names) == count else None)
        names = names or (list(imagenet.synsets()) if count == 1000 else None)
        about = {"classifier": getattr(classifier, "kind", "linear probe"), "feature": classifier.feature, "classes": count}
        return Judge(classifier.encoder, classifier.feature, probe, count, names, about, {}, options)
    if train is None or train.labels is None:
        raise UserError("this evaluation needs a classifier: give labelled train images for a k-NN bank, or a probe (`evaluate linear ... save=FILE`)")
    if k < 1 or not temperature > 0:
        raise UserError(f"k-NN takes k >= 1 and a temperature above 0, not {k} and {temperature}")
    bank = features.extract(encoder, train, feature, **options)
    device, rows, labels = next(encoder.parameters()).device, bank[feature], bank.labels
    count = len(names) if names else int(labels.max()) + 1

    def vote(queries: Tensor) -> Tensor:
        mine = queries if world is None else queries.tensor_split(world.size)[world.rank]
        similarity, index = nearest(rows, mine, min(k, len(rows)), device)
        found = votes(similarity, labels.to(device)[index], count, temperature).cpu()
        return found if world is None else world.gather(found)

    about = {"classifier": "k-NN", "k": min(k, len(rows)), "temperature": temperature, "feature": feature, "bank": len(rows), "bank_hash": bank.hash}
    return Judge(encoder, feature, vote, count, names, {**about, "classes": count}, bank.corrupt, options)


def differences(judging: Judge, probe: str) -> list[str]:
    """What a judge's protocol has other than the published one, whose classifier is `probe`."""
    if judging.about["classifier"] == "k-NN":
        return [f"k-NN votes of {judging.about['bank']} training images instead of {probe}"]
    if judging.about["classifier"] != "linear probe":
        return [f"{judging.about['classifier']} classifier instead of {probe}"]
    return [] if judging.count == 1000 else [f"a linear probe of {judging.count} classes instead of 1000"]


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest score is the label's, in per cent; of equal scores the first counts."""
    return 100.0 * float((scores.argmax(dim=1) == labels.to(scores.device)).double().mean()) if len(labels) else float("nan")

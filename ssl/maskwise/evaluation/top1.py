"""Top-1 and top-5 of a trained classifier on labeled test images."""

from __future__ import annotations

import dataclasses
import time

import torch

from maskwise.data.class_matching import class_names
from maskwise.errors import UserError
from maskwise.evaluation.protocol import labeled_sets
from maskwise.evaluation.report import Report, cost
from maskwise.evaluation.scoring.scorer import ClassifierOptions, scorer_of
from maskwise.functional.classification import topk_correct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top1Options(ClassifierOptions):
    """Options of top-1; a classifier or a probe is required."""

    evaluation = "top1"


def top1(encoder, data: dict, world=None, **options) -> Report:
    """Score a trained classifier on data["test"] by the encoder's transform -> Report with top1 and top5, in per cent.

    options: those of `Top1Options`. classifier: that of a supervised run, which `maskwise evaluate top1 RUN` finds by
    itself; probe: a file of `maskwise evaluate linear ... save=FILE`. A test set with other classes than the
    classifier's is scored among its own; with fewer than 5 classes, top5 is top-C. Raises UserError without a
    classifier or labels.
    """
    begin, chosen = time.perf_counter(), Top1Options(**options)
    if chosen.classifier is None and chosen.probe is None:
        raise UserError(
            "top1 scores a trained classifier: give a run of method supervised, or probe=FILE (`evaluate linear ... "
            "save=FILE`)"
        )
    data = labeled_sets("top1", data, "test")
    scorer = scorer_of(encoder, data, chosen, world)
    scored = scorer.score(data["test"])
    columns = scorer.columns("top1", data["test"])
    own = torch.unique(columns[columns >= 0])  # the test images' classes, in the classifier's order
    whole = class_names(data["test"]) is None or len(own) == len(scorer.classes or own)
    scores = scored.scores if whole else scored.scores[:, own]
    truth = columns[scored.labels] if whole else torch.searchsorted(own, columns[scored.labels])
    first, fifth = (100 * count / len(truth) for count in topk_correct(scores, truth).tolist())
    return Report(
        numbers={"top1": first, "top5": fifth},
        protocol={
            "evaluation": "top1",
            **scorer.about,
            "arg-max": "over all classes" if whole else "over the test images' classes",
            "test": len(data["test"]),
        },
        data_hash=scored.hash,
        cost=cost(begin, len(scored.labels), next(encoder.parameters()).device),
        corrupt=scored.corrupt,
    )

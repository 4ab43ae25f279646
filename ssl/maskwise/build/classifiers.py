"""Trained classifiers of supervised runs, in the form that evaluations take."""

from __future__ import annotations

import torch
from torch import nn

from maskwise.evaluation.report import Report
from maskwise.evaluation.scoring.classifier import Classifier, Logits
from maskwise.evaluation.top1 import top1
from maskwise.export import load
from maskwise.export.formats import saved_classifier
from maskwise.nn import Encoder


def as_classifier(encoder: Encoder, head: nn.Module, names=None, kind: str = "the run's own") -> Classifier:
    """Return an encoder and its trained head as the classifier of an evaluation."""
    classifier = Classifier(Logits(encoder, head), torch.nn.Identity(), "pooled")
    classifier.kind, classifier.count, classifier.classes = kind, head.classes, list(names) if names else None
    return classifier


def accuracy(test, world, names, model) -> Report:
    """Report top-1 and top-5 of the teacher, and those of the student where the teacher is an average.

    names: those of the training classes, or None.
    """
    networks = {"": model.teacher}
    if model.teacher is not model.student:
        networks["student_"] = model.student
    reports = {
        prefix: top1(
            network.encoder, {"test": test}, world, classifier=as_classifier(network.encoder, network.head, names)
        )
        for prefix, network in networks.items()
    }
    report = reports.pop("")
    for prefix, other in reports.items():
        report.numbers.update({f"{prefix}{key}": value for key, value in other.numbers.items()})
    return report


def classifier_of(model, encoder: Encoder, weights: str = "teacher", light: bool = False) -> Classifier | None:
    """Return the classifier in a run folder's last checkpoint or in an exported folder, None where there is none.

    `encoder` is loaded from the same place. light: without the parts needed in training alone (MAP-light).
    Raises UserError where the classifier has no such form.
    """
    trained = saved_classifier.read(load.resolve_path(model), weights)
    if trained is None:
        return None
    if light:
        trained = trained.lightened(encoder)
    return as_classifier(encoder, trained.on(encoder), trained.classes, "the run's own" + ", light" * trained.light)

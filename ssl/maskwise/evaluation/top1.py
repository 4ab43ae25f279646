"""Top-1 and top-5 of a trained classifier on labelled test images."""

from __future__ import annotations

import time

from maskwise.evaluation.judge import judge
from maskwise.evaluation.report import Report
from maskwise.functional.classification import hits
from maskwise.functional.errors import UserError


def top1(encoder, data: dict, world=None, *, classifier=None, probe=None, batch_size: int = 256, cache=None) -> Report:
    """Accuracy on data["test"] by the encoder's transform -> Report with top1 and top5 (or top-C), in per cent.

    classifier: what a run of method supervised has learnt, which `maskwise evaluate top1 RUN` finds by itself; probe: a file of
    `maskwise evaluate linear ... save=FILE`. A test set of other classes than the classifier's is scored among its own. Raises UserError
    where there is neither, or no labels.
    """
    begin = time.perf_counter()
    if classifier is None and probe is None:
        raise UserError("top1 scores a trained classifier: give a run of method supervised, or probe=FILE (`evaluate linear ... save=FILE`)")
    if data.get("test") is None or data["test"].labels is None:
        raise UserError("top1 needs labelled test images; give test=FOLDER with one subfolder per class")
    judging = judge(encoder, data, classifier, probe=probe, world=world, batch_size=batch_size, cache=cache)
    seen = judging(data["test"])
    theirs = getattr(data["test"], "classes", None)
    alike = not theirs or not judging.classes or list(theirs) == list(judging.classes)
    scores = seen.scores if alike else seen.scores[:, judging.columns("top1", data["test"])]
    if int(seen.labels.max()) >= scores.shape[1]:
        raise UserError(f"top1: the test images have {int(seen.labels.max()) + 1} classes and the classifier knows {scores.shape[1]}; give images of its classes")
    one, five = (100 * count / len(seen.labels) for count in hits(scores, seen.labels).tolist())
    seconds = time.perf_counter() - begin
    return Report(
        numbers={"top1": one, "top5": five},
        protocol={"evaluation": "top1", **judging.about, "arg-max": "over all classes" if alike else "over the test images' classes", "test": len(data["test"])},
        data_hash=seen.hash,
        cost={"seconds": round(seconds, 3), "images": len(seen.labels), "images_per_second": round(len(seen.labels) / max(seconds, 1e-9), 1),
              "device": str(next(encoder.parameters()).device)},
        corrupt=seen.corrupt,
    )  # fmt: skip


top1.needs = ("test",)

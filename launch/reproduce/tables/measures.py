"""Evaluations of finished runs, one file each, so that a kill loses at most the one in progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.reproduce.tables.plan import Job
from maskwise.bench import record

K = 20
BOX_IMAGES = 1024  # of localization and discovery, which read one image at a time


@dataclass(frozen=True)
class Number:
    """A number of the table: title, evaluation, and the name in its report."""

    title: str
    measure: str
    name: str


NUMBERS = {
    "top1": Number("top-1", "top1", "top1"),
    "knn": Number("k-NN", "knn", "top1"),
    "linear": Number("linear", "linear", "top1"),
    "few_shot_1": Number("1 image a class", "few_shot", "top1_1"),
    "few_shot_5": Number("5 images a class", "few_shot", "top1_5"),
    "masks_on_objects": Number("AttMask-High on objects", "mask_quality", "attmask_high"),
    "boxes": Number("MaxBoxAccV2", "localization", "max_box_acc_v2"),
    "lost": Number("CorLoc (LOST)", "discovery", "lost"),
}


@dataclass(frozen=True)
class Trained:
    """A run's encoder and its images; cache: a folder of features; shortened: probes take minutes, not days."""

    folder: Path
    encoder: Any
    data: dict
    objects: Any
    cache: Path
    shortened: bool

    @property
    def gives_attention(self) -> bool:
        """Whether the pooling computes an attention map."""
        return getattr(self.encoder.pooling, "gives_attention", False)


def knn(trained: Trained) -> dict:
    """Weighted k-NN, k = 20, all images of both sets; `right` says for each test image whether it was right."""
    from maskwise.evaluation.features import extract
    from maskwise.evaluation.knn import knn_classify
    from maskwise.evaluation.protocol import labeled_sets

    data = labeled_sets("k-NN", trained.data, "train", "test")
    names = ("pooled", "patch_mean")
    train, test = (extract.extract(trained.encoder, data[role], names, cache=trained.cache) for role in data)
    k = min(K, len(train))
    right = {
        name: (knn_classify(train[name], train.labels, test[name], k)[:, 0].cpu() == test.labels).numpy()
        for name in names
    }
    numbers = {"top1": 100 * right["pooled"].mean(), "patch_mean_top1": 100 * right["patch_mean"].mean()}
    return {
        "numbers": {name: float(value) for name, value in numbers.items()},
        "protocol": {"k": k, "temperature": 0.07, "bank": len(train), "queries": len(test)},
        "right": packed(right["pooled"]),
    }


def linear(trained: Trained) -> dict:
    """Linear probe; shortened: 45 rates at once on frozen pooled vectors, the best rate on the test images."""
    from maskwise.evaluation.linear import linear as probe

    short = {"preset": "ibot-sweep", "feature": "pooled", "augment": False, "evaluate_every": 10}
    return content(probe(trained.encoder, trained.data, cache=trained.cache, **short if trained.shortened else {}))


def few_shot(trained: Trained) -> dict:
    """k-NN among 1 and 5 labeled images a class, mean over five choices of them."""
    from maskwise.evaluation.few_shot import few_shot as evaluate

    return content(evaluate(trained.encoder, trained.data, per_class=(1, 5)))


def mask_quality(trained: Trained) -> dict:
    """Share of masked patches that lie on objects."""
    from maskwise.evaluation.mask_overlap import mask_overlap

    return content(mask_overlap(trained.encoder, objects(trained)))


def localization(trained: Trained) -> dict:
    """MaxBoxAccV2 of the attention, images at the size that the network was trained on."""
    from maskwise.evaluation.localization import localization as evaluate

    size = {"size": min(trained.encoder.image_size)} if trained.shortened else {}
    return content(evaluate(trained.encoder, objects(trained), **size))


def discovery(trained: Trained) -> dict:
    """CorLoc of LOST, and of DINO-seg where there is attention."""
    from maskwise.evaluation.discovery import discovery as evaluate

    methods = ("lost", "dino_seg") if trained.gives_attention else ("lost",)
    return content(evaluate(trained.encoder, objects(trained), methods=methods))


def top1(trained: Trained) -> dict:
    """Top-1 of a supervised run's classifier."""
    import maskwise

    return content(maskwise.evaluate("top1", str(trained.folder)))


MEASURES: dict[str, Callable[[Trained], dict]] = {
    "knn": knn,
    "linear": linear,
    "few_shot": few_shot,
    "mask_quality": mask_quality,
    "localization": localization,
    "discovery": discovery,
    "top1": top1,
}
NEEDS_ATTENTION = ("localization",)
NEEDS_OBJECTS = ("mask_quality", "localization", "discovery")


def objects(trained: Trained) -> dict:
    """Return the images with boxes, at most BOX_IMAGES where probes are shortened."""
    from maskwise.data.datasets.subset import subsample_evenly

    images = trained.objects
    return {"test": subsample_evenly(images, BOX_IMAGES) if trained.shortened and len(images) > BOX_IMAGES else images}


def content(report) -> dict:
    """Return numbers, protocol and cost of a report."""
    stored = report.content()
    return {name: stored[name] for name in ("numbers", "protocol", "cost")}


def packed(right: np.ndarray) -> dict:
    """Return bool [n] as text: {"images": n, "bits": hexadecimal digits}."""
    return {"images": len(right), "bits": np.packbits(right).tobytes().hex()}


def unpacked(stored: dict) -> np.ndarray:
    """Return what `packed` stored."""
    bits = np.frombuffer(bytes.fromhex(stored["bits"]), np.uint8)
    return np.unpackbits(bits, count=stored["images"]).astype(bool)


def measure_file(job: Job, out: Path, name: str) -> Path:
    """Return the file of a run's evaluation."""
    return out / "measures" / job.setting / job.row / f"seed{job.seed}" / f"{name}.json"


def missing(job: Job, out: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the evaluations of a run that have no file."""
    return tuple(name for name in names if not measure_file(job, out, name).is_file())


def measured(job: Job, out: Path, names: tuple[str, ...]) -> dict[str, dict]:
    """Return the evaluations of a run that there are."""
    files = {name: measure_file(job, out, name) for name in names}
    return {name: record.read(file) for name, file in files.items() if file.is_file()}


def measure(
    job: Job, out: Path, names: tuple[str, ...], shortened: bool, boxes: str | None, *, end: float | None = None
) -> bool:
    """Evaluate a complete run, one file for each name that has none; returns whether all are there."""
    cache = out / "features" / job.key
    trained = None
    for name in missing(job, out, names):
        if end is not None and time.time() >= end:
            return False
        trained = trained or opened(job, out, cache, shortened, boxes)
        found = evaluated(name, trained)
        file = measure_file(job, out, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        record.write(file, {"record": record_of(job, name, trained), **found})
    shutil.rmtree(cache, ignore_errors=True)
    return True


def opened(job: Job, out: Path, cache: Path, shortened: bool, boxes: str | None) -> Trained:
    """Load a run's encoder and open its images."""
    import torch

    import maskwise
    from maskwise import build
    from maskwise.data.benchmark_sets import boxed

    folder = job.folder(out)
    recipe, device = job.read(), "cuda" if torch.cuda.is_available() else "cpu"
    data = {role: build.dataset(recipe, role) for role in ("train", "test")}
    test = data["test"]
    own = test if hasattr(test, "mask") or boxed.has_boxes(test) else None
    given = boxed.read(boxes)["test"] if boxes else own
    return Trained(folder, maskwise.load(folder).to(device), data, given, cache, shortened)


def evaluated(name: str, trained: Trained) -> dict:
    """Return an evaluation's numbers, or why there are none."""
    if name in NEEDS_OBJECTS and trained.objects is None:
        return {"numbers": {}, "left_out": "no boxes"}
    if name in NEEDS_ATTENTION and not trained.gives_attention:
        return {"numbers": {}, "left_out": "the pooling computes no attention"}
    return MEASURES[name](trained)


def record_of(job: Job, name: str, trained: Trained) -> dict:
    """Return the record of an evaluation."""
    command = f"launch.reproduce.tables.measures.{name} of {job.key}"
    return record.describe(next(trained.encoder.parameters()).device, job.seed, command)

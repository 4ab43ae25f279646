"""Baselines of k-NN accuracy: an untrained network, raw pixels and PCA-whitened pixels."""

from __future__ import annotations

import time
from collections.abc import Sequence

from maskwise.data.datasets.subset import subsample_evenly
from maskwise.errors import UserError
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.features.views import RawPixels
from maskwise.evaluation.knn import PIXEL_SIZE, knn
from maskwise.evaluation.protocol import as_tuple, labeled_sets
from maskwise.evaluation.report import Report, cost, joint_hash

NAME = "baselines"
MOST_IMAGES = 100_000  # of each set: raw pixels of more would not fit into memory beside a training run
UNTRAINED, PIXELS, WHITENED = "untrained", "pixels", "whitened_pixels"


def baselines(
    data: dict,
    world=None,
    *,
    untrained=None,
    k: int | Sequence[int] = (10, 20),
    size: int | None = None,
    batch_size: int = 256,
) -> Report:
    """Measure k-NN of data["test"] among data["train"] by features that nothing was trained for -> Report, per cent.

    untrained: an encoder with random weights, or None for pixels alone; size: side that the pixels are resized to, by
    default the encoder's image size, at most 32. Numbers: {row}_top1_k{k} of the rows `untrained_pooled`,
    `untrained_patch_mean`, `pixels` and `whitened_pixels`, and `chance`. Each set is spread evenly over at most 100,000
    images. Pixels that PCA cannot whiten are left out with a note. Raises UserError for sets without labels.
    """
    begin = time.perf_counter()
    data = images_of(data)
    encoder = RawPixels(PIXEL_SIZE) if untrained is None else untrained
    side = pixel_size(encoder) if size is None else size
    options = {"k": as_tuple(k), "batch_size": batch_size, "pixels": side}
    options["feature"] = () if untrained is None else ("pooled", "patch_mean")
    notes = []
    try:
        report = knn(encoder, data, world, whitened_pixels=side, **options)
    except UserError as error:
        if "PCA" not in str(error):
            raise
        report, notes = knn(encoder, data, world, **options), [str(error)]
    names = {"pooled": "untrained_pooled", "patch_mean": "untrained_patch_mean", PIXELS: PIXELS, WHITENED: WHITENED}
    numbers = {}
    for key, value in report.numbers.items():
        feature, is_top1, ending = key.partition("_top1_k")
        if is_top1:
            numbers[f"{names[feature]}_top1_k{ending}"] = value
    numbers["chance"] = 100.0 / len(data["train"].labels.unique())
    protocol = {**report.protocol, "evaluation": NAME}
    device = next(encoder.parameters()).device
    images = len(data["train"]) + len(data["test"])
    return Report(numbers, protocol, report.data_hash, cost(begin, images, device), report.corrupt, notes=notes)


def images_of(data: dict) -> dict:
    """Return the images that the baselines of these sets are measured on."""
    data = {role: subsample_evenly(data[role], MOST_IMAGES) for role in ("train", "test")}
    return labeled_sets("baselines", data, "train", "test")


def data_hash(data: dict) -> str:
    """Return the data hash that the baselines of these sets have."""
    data = images_of(data)
    return joint_hash(*(fingerprint(data[role]) for role in ("train", "test")))


def pixel_size(encoder) -> int:
    """Return the side of the pixels beside an encoder: its image size, at most 32."""
    return min(int(min(encoder.image_size)) if hasattr(encoder, "image_size") else PIXEL_SIZE, PIXEL_SIZE)


def rows(report: Report, k: int | None = None) -> dict[str, float]:
    """Return the accuracy of each baseline at k (by default the headline's) under the name of a table's row.

    The untrained network's is the better one of its two features.
    """
    k, numbers = k or report.protocol["headline_k"], report.numbers
    best = [numbers[f"untrained_{name}_top1_k{k}"] for name in ("pooled", "patch_mean") if has(report, name, k)]
    found = {"untrained network": max(best)} if best else {}
    found["raw pixels"] = numbers[f"{PIXELS}_top1_k{k}"]
    if f"{WHITENED}_top1_k{k}" in numbers:
        found["whitened pixels"] = numbers[f"{WHITENED}_top1_k{k}"]
    return found


def has(report: Report, feature: str, k: int) -> bool:
    """Whether a report holds a feature of an untrained network at k."""
    return f"untrained_{feature}_top1_k{k}" in report.numbers


def line(report: Report) -> str:
    """Return the baselines in one line."""
    values = "  ".join(f"{name} {value:.1f}" for name, value in rows(report).items())
    return f"k-NN baselines (k = {report.protocol['headline_k']}): {values}  chance {report.numbers['chance']:.1f}"


def table(report: Report) -> str:
    """Return the baselines as a text table with their protocol."""
    protocol = report.protocol
    lines = [
        f"k-NN top-1, per cent (k = {protocol['headline_k']}, bank of {protocol['bank']} images, "
        f"{protocol['queries']} queries; pixels at {protocol[PIXELS]} x {protocol[PIXELS]}; "
        f"chance {report.numbers['chance']:.1f})"
    ]
    for name, value in rows(report).items():
        note = f"   {protocol[WHITENED]['dims']} dimensions" if name == "whitened pixels" else ""
        lines.append(f"  {name:<30}{value:7.1f}{note}")
    return "\n".join([*lines, *report.notes])

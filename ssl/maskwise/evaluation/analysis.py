"""What a pooling does to the network before it: diversity, dead neurons, what is seen beyond the salient part, errors of single tokens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.evaluation import features
from maskwise.evaluation.activations import THRESHOLD, Observation, observe
from maskwise.evaluation.knn import nearest, votes
from maskwise.evaluation.masked import masked
from maskwise.evaluation.report import Report
from maskwise.functional import draw
from maskwise.functional.errors import UserError
from maskwise.functional.metrics import token_errors

PARTS = ("diversity", "dead", "salient", "tokens")


def analysis(
    encoder, data: dict, world=None, *, parts: Sequence[str] = (), guide=None, classifier=None, probe=None, ratios: Sequence[float] = (),
    modes: Sequence[str] = ("high", "random"), beside: Sequence[str] = (), k: int = 20, temperature: float = 0.07, batch_size: int = 64, seed: int = 0, cache=None,
) -> Report:  # fmt: skip
    """The analysis of the MAP paper of any encoder over data["test"] -> Report with curves and pictures.

    parts: `diversity` (variance of every layer's features over places and over channels), `dead` (neurons that fire for no
    image), `salient` (top-1 while the patches that `guide`, by default the encoder itself, attends to most are blackened; see masked),
    `tokens` (zero-one bias and variance of a classifier's tokens, or by k-NN of a pooling's vectors); by default all that
    encoder and data allow, and the protocol says what they do not. Who judges: classifier, probe, or k-NN votes of
    data["train"]. beside: reports of other encoders, drawn into the same pictures. MAP 3, 4.2.1, pooling.md 3.5, evaluation.md 13.
    Raises UserError for an unknown part, and for one asked for that cannot be had.
    """
    begin = time.perf_counter()
    asked = (parts,) if isinstance(parts, str) else tuple(parts)
    if unknown := [part for part in asked if part not in PARTS]:
        raise UserError(f"analysis: no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    others = {Path(path).stem: Report.load(path) for path in ((beside,) if isinstance(beside, (str, Path)) else tuple(beside))}
    test, chosen = data["test"], asked or PARTS
    numbers, curves, protocol, corrupt, seeds = {}, {}, {"evaluation": "analysis", "preset": "map"}, {}, {}
    if {"diversity", "dead"} & set(chosen):
        found = observe(encoder, test, world=world, batch_size=batch_size)
        corrupt |= found.corrupt
        for part, tell in (("diversity", diversity), ("dead", dead)):
            if part in chosen:
                for kept, new in zip((numbers, curves, protocol), tell(found)):
                    kept |= new
    judging = {"classifier": classifier, "probe": probe, "k": k, "temperature": temperature, "batch_size": batch_size}
    left_out = {}
    for part, tell in (("salient", salient), ("tokens", tokens)):
        if part not in chosen:
            continue
        try:
            for kept, new in zip((numbers, curves, protocol), tell(encoder, data, world, guide=guide, ratios=ratios, modes=modes, seed=seed, cache=cache, **judging)):
                kept |= new
            seeds |= {"random": seed} if part == "salient" and "random" in modes else {}
        except UserError as error:
            if asked:
                raise
            left_out[part] = str(error)
    seconds = time.perf_counter() - begin
    report = Report(
        numbers=numbers,
        protocol={**protocol, "parts": [part for part in chosen if part not in left_out], "left_out": left_out, "images": len(test), "differences": DIFFERENCES},
        data_hash=features.fingerprint(test),
        cost={"seconds": round(seconds, 3), "images": len(test), "images_per_second": round(len(test) / seconds, 1), "device": str(next(encoder.parameters()).device)},
        corrupt=corrupt,
        seeds=seeds,
        curves=curves,
    )  # fmt: skip
    report.pictures = pictures({"this": report, **others})
    return report


analysis.needs = ("test",)
analysis.labels = False
DIFFERENCES = ["our reading of definitions that the paper leaves to a supplement: see docs/evaluations.md"]


def diversity(found: Observation) -> tuple[dict, dict, dict]:
    """Numbers, curves and protocol of the layers' variance; x runs from 0, the first layer, to 1, the last."""
    numbers, curves = {}, {}
    for name, values in found.diversity.items():
        numbers[f"{name}_diversity"] = float(np.mean(values))
        curves[f"{name}_diversity"] = [(i / max(1, len(values) - 1), value) for i, value in enumerate(values)]
    return numbers, curves, {"layers": len(found.diversity["spatial"])}


def dead(found: Observation) -> tuple[dict, dict, dict]:
    """Numbers, curves and protocol of the neurons, in per cent; x runs from 0, the first activation, to 1, the last."""
    kinds = {"silent": "silent", "units": "dead_units", "channels": "dead_channels"}
    numbers, curves = {}, {}
    for field, name in kinds.items():
        values = [100 * getattr(each, field) for each in found.neurons]
        numbers[name] = float(np.mean(values)) if values else float("nan")
        curves[name] = [(i / max(1, len(values) - 1), value) for i, value in enumerate(values)]
    rule = f"above 0 behind a ReLU; else at least {THRESHOLD:g} of the layer's root mean square for the image"
    return numbers, curves, {"activations": [each.name for each in found.neurons], "fires": rule}


def salient(encoder, data, world, *, guide, ratios, modes, seed, cache, **judging) -> tuple[dict, dict, dict]:
    """Numbers, curves and protocol of accuracy while salient patches are blackened; x is the share of patches, in per cent."""
    found = masked(encoder, data, world, preset="map", ratios=ratios, modes=modes, guide=guide, seed=seed, cache=cache, **judging)
    numbers = {f"salient_{name}": value for name, value in found.numbers.items()}
    curves = {}
    for mode in found.protocol["modes"]:
        curves[f"salient_{mode}"] = [(100.0 * ratio, found.numbers[f"{mode}_{ratio:g}_top1"]) for ratio in found.protocol["ratios"]]
    kept = ("guide", "fill", "grid", "classifier", "feature", "classes", "bank")
    return numbers, curves, {"salient": {key: found.protocol[key] for key in kept if key in found.protocol}}


def tokens(encoder, data, world, *, classifier, probe, k, temperature, batch_size, cache, **unread) -> tuple[dict, dict, dict]:
    """Numbers, curves and protocol of single tokens' errors against what they say together; x is the token's number."""
    network = getattr(getattr(classifier, "encoder", None), "classifier", None)  # what a supervised run has learnt
    own = hasattr(network, "each")
    for role in ("test",) if own else ("train", "test"):
        if data.get(role) is None or data[role].labels is None:
            raise UserError(f"analysis: tokens are judged by labels, and there are no labelled {role} images; give {role}=FOLDER with one subfolder per class")
    if own:
        each, together, labels = of_classifier(classifier.encoder.encoder, network, data["test"], world, batch_size)
        about = {"judge": "the classifier's own tokens"}
    else:
        each, together, labels = of_vectors(encoder, data, k=k, temperature=temperature, world=world, batch_size=batch_size, cache=cache)
        about = {"judge": "k-NN of each vector, and of the pooled one", "k": k, "temperature": temperature}
    numbers = {f"token_{name}": value for name, value in token_errors(each, together, labels).items()}
    alone = {"token_error": each != labels[:, None], "token_variance": each != together[:, None]}
    curves = {name: [(i, 100.0 * float(wrong[:, i].double().mean())) for i in range(each.shape[1])] for name, wrong in alone.items()}
    return numbers, curves, {"tokens": {"count": each.shape[1], **about}}


def of_classifier(encoder, network, dataset, world=None, batch_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Classes that every token says alone int64 [n, k], that all say together [n], and labels [n], of the readable images."""
    rows = torch.arange(len(dataset))
    if world is not None and world.size > 1:
        rows = rows[rows // batch_size % world.size == world.rank]
    parts = []
    with features.evaluating(network), torch.no_grad():
        for index, _, seen in features.stream(encoder, dataset, rows=rows, batch_size=batch_size, layers=network.layers):
            parts.append(torch.cat([index[:, None], network(seen).argmax(1, keepdim=True).cpu(), network.each(seen).argmax(2).cpu()], dim=1))
    found = torch.cat(parts) if parts else torch.zeros(0, 2 + network.tokens, dtype=torch.int64)
    found = found if world is None else world.gather(found)
    if not len(found):
        raise UserError(f"none of the {len(dataset)} images can be read; give images")
    found = found[found[:, 0].argsort()]
    return found[:, 2:], found[:, 1], torch.as_tensor(dataset.labels)[found[:, 0]]


def of_vectors(encoder, data: dict, *, k: int, temperature: float, world=None, batch_size: int = 64, cache=None) -> tuple[Tensor, Tensor, Tensor]:
    """The same by k-NN votes of data["train"]: of each of a pooling's vectors, and of its pooled vector."""
    options = {"world": world, "batch_size": batch_size, "cache": cache}
    with vectors_of(encoder):
        bank, seen = (features.extract(encoder, data[role], ("pooled", "vectors"), **options) for role in ("train", "test"))
    classes = 1 + int(max(bank.labels.max(), seen.labels.max()))
    device = next(encoder.parameters()).device

    def named(rows: Tensor, queries: Tensor) -> Tensor:
        similarity, index = nearest(rows, queries, min(k, len(rows)), device)
        return votes(similarity, bank.labels.to(device)[index], classes, temperature).argmax(dim=1).cpu()

    each = [named(bank["vectors"][:, i], seen["vectors"][:, i]) for i in range(seen["vectors"].shape[1])]
    return torch.stack(each, dim=1), named(bank["pooled"], seen["pooled"]), seen.labels


@contextlib.contextmanager
def vectors_of(encoder) -> Iterator[None]:
    """A pooling that averages its vectors hands them out inside, beside the average."""
    pooling = getattr(encoder, "pooling", None)
    averages = getattr(pooling, "reduce", None) == "mean"
    if averages:
        pooling.reduce = "max_logit"
    try:
        yield
    finally:
        if averages:
            pooling.reduce = "mean"


def pictures(reports: dict[str, Report]) -> dict[str, np.ndarray]:
    """Charts of the curves of one or several analyses, by name; those that none of them has are left out -> uint8 [H, W, 3] each."""
    drawn = {}
    for name, (charts, x_name) in CHARTS.items():
        sheets = []
        for curve, title in charts:
            series = {who: report.curves[curve] for who, report in reports.items() if report.curves.get(curve)}
            if series:
                sheets.append(draw.chart({who: [(x, y) for x, y in points if y is not None] for who, points in series.items()}, title, x_name=x_name))
        if sheets:
            drawn[name] = np.concatenate(sheets, axis=1 if len(sheets) < 3 else 0)
    return drawn


CHARTS = {
    "diversity": ((("spatial_diversity", "variance over places"), ("channel_diversity", "variance over channels")), "depth"),
    "dead": ((("dead_units", "dead neurons (%)"), ("dead_channels", "dead channels (%)"), ("silent", "activations that do not fire (%)")), "depth"),
    "salient": ((("salient_high", "top-1 without the most attended patches (%)"), ("salient_random", "top-1 without random patches (%)")), "hidden (%)"),
    "tokens": ((("token_error", "error of each token (%)"), ("token_variance", "unlike all together (%)")), "token"),
}

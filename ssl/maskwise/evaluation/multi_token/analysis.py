"""Analysis of the MAP paper: feature diversity, dead neurons, non-salient accuracy, errors and logits of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwise.bounds import Count, Positive
from maskwise.data.class_matching import numbered_like
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.knn import nearest, votes
from maskwise.evaluation.masked import masked
from maskwise.evaluation.multi_token import token_logits
from maskwise.evaluation.multi_token.activations import THRESHOLD, Observation, observe
from maskwise.evaluation.protocol import Options, as_tuple, labeled_sets
from maskwise.evaluation.report import Report, cost
from maskwise.functional.metrics import token_errors
from maskwise.imaging.charts import line_chart

PARTS = ("diversity", "dead", "salient", "tokens", "logits")


Part = tuple[dict, dict, dict]  # numbers, curves, protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisOptions(Options):
    """Options of the analysis.

    parts: `diversity` (feature variance of every layer over positions and channels), `dead` (neurons that fire for no
    image), `salient` (top-1 with the patches most attended by `guide` blackened; see masked), `tokens` (zero-one bias
    and variance of a classifier's tokens, or by k-NN of a pooling's vectors), `logits` (spread of the logits of a
    classifier's tokens within and between groups); by default all that encoder and data allow. Scores are by
    classifier, probe, or k-NN votes of data["train"]. beside: reports of other encoders, drawn into the same pictures.
    """

    evaluation = "analysis"

    parts: str | Sequence[str] = ()
    guide: object = None
    classifier: object = None
    probe: object = None
    ratios: float | Sequence[float] = ()
    modes: str | Sequence[str] = ("high", "random")
    beside: str | os.PathLike | Sequence[str | os.PathLike] = ()
    k: Count = 20
    temperature: Positive = 0.07
    batch_size: Count = 64
    seed: int = 0
    cache: object = None

    def shared(self, *names: str) -> dict:
        """Return some of the options by name."""
        return {name: getattr(self, name) for name in names}


def analysis(encoder, data: dict, world=None, **options) -> Report:
    """Run the analysis of the MAP paper (sec. 3 and 4.2.1) over data["test"] -> Report with curves and pictures.

    options: those of `AnalysisOptions`. The protocol lists the parts that encoder and data do not allow. Raises
    UserError for an unknown part, and for a requested one that cannot be computed.
    """
    begin, chosen = time.perf_counter(), AnalysisOptions(**options)
    requested = as_tuple(chosen.parts)
    if unknown := [part for part in requested if part not in PARTS]:
        raise UserError(f"analysis: no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    others = {Path(path).stem: Report.load(path) for path in as_tuple(chosen.beside)}
    test, wanted = data["test"], requested or PARTS
    results, left_out, corrupt = {}, {}, {}
    if {"diversity", "dead"} & set(wanted):
        observation = observe(encoder, test, world=world, batch_size=chosen.batch_size)
        corrupt |= observation.corrupt
        layers = {"diversity": diversity, "dead": dead}
        results |= {part: measure(observation) for part, measure in layers.items() if part in wanted}
    for part, measure in (("salient", salient), ("tokens", tokens), ("logits", logits)):
        if part not in wanted:
            continue
        try:
            results[part] = measure(encoder, data, world, chosen)
        except UserError as error:
            if requested:
                raise
            left_out[part] = str(error)
    numbers, curves, protocol = ({k: v for part in results.values() for k, v in part[i].items()} for i in range(3))
    report = Report(
        numbers=numbers,
        protocol={
            "evaluation": "analysis",
            "preset": "map",
            **protocol,
            "parts": [part for part in wanted if part not in left_out],
            "left_out": left_out,
            "images": len(test),
            "differences": DIFFERENCES,
        },
        data_hash=fingerprint(test),
        cost=cost(begin, len(test), next(encoder.parameters()).device),
        corrupt=corrupt,
        seeds={"random": chosen.seed} if "salient" in results and "random" in as_tuple(chosen.modes) else {},
        curves=curves,
    )
    report.pictures = pictures({"this encoder": report, **others})
    return report


DIFFERENCES = ["definitions that the paper leaves to a supplement are interpreted as in docs/evaluations.md"]


def diversity(observation: Observation) -> Part:
    """Return feature variance by layer; x runs from 0, the first layer, to 1, the last."""
    numbers, curves = {}, {}
    for name, values in observation.diversity.items():
        numbers[f"{name}_diversity"] = float(np.mean(values))
        curves[f"{name}_diversity"] = [(i / max(1, len(values) - 1), value) for i, value in enumerate(values)]
    return numbers, curves, {"layers": len(observation.diversity["spatial"])}


def dead(observation: Observation) -> Part:
    """Return inactive neurons in per cent; x runs from 0, the first activation layer, to 1, the last."""
    kinds = {"silent": "silent", "units": "dead_units", "channels": "dead_channels"}
    numbers, curves = {}, {}
    for field, name in kinds.items():
        values = [100 * getattr(layer, field) for layer in observation.neurons]
        numbers[name] = float(np.mean(values)) if values else float("nan")
        curves[name] = [(i / max(1, len(values) - 1), value) for i, value in enumerate(values)]
    rule = f"above 0 after a ReLU; else at least {THRESHOLD:g} of the layer's root mean square for the image"
    return numbers, curves, {"activations": [layer.name for layer in observation.neurons], "fires": rule}


def salient(encoder, data: dict, world, chosen: AnalysisOptions) -> Part:
    """Return top-1 with salient patches blackened; x is the share of patches, in per cent."""
    names = ("ratios", "modes", "guide", "seed", "cache", "classifier", "probe", "k", "temperature", "batch_size")
    report = masked(encoder, data, world, preset="map", **chosen.shared(*names))
    numbers = {f"salient_{name}": value for name, value in report.numbers.items()}
    curves = {}
    for mode in report.protocol["modes"]:
        points = [(100.0 * ratio, report.numbers[f"{mode}_{ratio:g}_top1"]) for ratio in report.protocol["ratios"]]
        curves[f"salient_{mode}"] = points
    keys = ("guide", "fill", "grid", "classifier", "feature", "classes", "bank")
    return numbers, curves, {"salient": {key: report.protocol[key] for key in keys if key in report.protocol}}


def tokens(encoder, data: dict, world, chosen: AnalysisOptions) -> Part:
    """Return errors of single tokens and their disagreement with the joint prediction; x is the token's number."""
    network = getattr(getattr(chosen.classifier, "encoder", None), "classifier", None)  # that of a supervised run
    has_tokens = hasattr(network, "token_logits")
    data = labeled_sets("analysis of tokens", data, *(("test",) if has_tokens else ("train", "test")))
    if network is not None:
        inner = chosen.classifier.encoder.encoder
        test = numbered_like(data["test"], chosen.classifier, "analysis", others="the classifier's classes")
        single, joint, labels = of_classifier(inner, network, test, world, chosen.batch_size)
        about = {"scored_by": "the classifier's own tokens"}
    else:
        options = chosen.shared("k", "temperature", "batch_size", "cache")
        single, joint, labels = of_vectors(encoder, data, world=world, **options)
        about = {"scored_by": "k-NN of each vector, and of the pooled one", **chosen.shared("k", "temperature")}
    numbers = {f"token_{name}": value for name, value in token_errors(single, joint, labels).items()}
    wrong = {"token_error": single != labels[:, None], "token_variance": single != joint[:, None]}
    curves = {
        name: [(i, 100.0 * float(errors[:, i].double().mean())) for i in range(single.shape[1])]
        for name, errors in wrong.items()
    }
    return numbers, curves, {"tokens": {"count": single.shape[1], **about}}


def logits(encoder, data: dict, world, chosen: AnalysisOptions) -> Part:
    """Return the spread of the logits of single tokens within and between groups, and their points in a plane."""
    network = token_network(chosen)
    if network is None:
        raise UserError(
            "analysis: logits are those of a classifier's tokens, and this encoder has none; give a supervised run "
            "with classifier map or class_tokens"
        )
    inner = chosen.classifier.encoder.encoder
    return token_logits.distribution(inner, network, data["test"], world, chosen.batch_size)


def token_network(chosen: AnalysisOptions):
    """Return the classifier of a supervised run if it has tokens, else None."""
    network = getattr(getattr(chosen.classifier, "encoder", None), "classifier", None)
    return network if hasattr(network, "token_logits") else None


def of_classifier(encoder, network, dataset, world=None, batch_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return predictions of single tokens int64 [n, k], the joint one [n], and labels [n], of the readable images."""
    rows = extract.rank_share(len(dataset), world, batch_size)
    parts = [torch.zeros(0, 2 + network.tokens, dtype=torch.int64)]
    stream = extract.stream(encoder, dataset, rows=rows, batch_size=batch_size, layers=network.layers)
    with extract.evaluating(network), torch.no_grad():
        for index, _, features in stream:
            joint = network(features).argmax(1, keepdim=True).cpu()
            single = network.token_logits(features).argmax(2).cpu()
            parts.append(torch.cat([index[:, None], joint, single], dim=1))
    table = torch.cat(parts)
    table = table if world is None else world.gather(table)
    extract.require_images(len(table), dataset, {})
    table = table[table[:, 0].argsort()]
    return table[:, 2:], table[:, 1], torch.as_tensor(dataset.labels)[table[:, 0]]


def of_vectors(
    encoder, data: dict, *, k: int, temperature: float, world=None, batch_size: int = 64, cache=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return predictions as `of_classifier` by k-NN votes of data["train"], for each vector and the pooled one."""
    options = {"world": world, "batch_size": batch_size, "cache": cache}
    with vectors_of(encoder):
        bank, test = (
            extract.extract(encoder, data[role], ("pooled", "vectors"), **options) for role in ("train", "test")
        )
    classes = 1 + int(max(bank.labels.max(), test.labels.max()))
    device = next(encoder.parameters()).device

    def predict(rows: Tensor, queries: Tensor) -> Tensor:
        similarity, index = nearest(rows, queries, min(k, len(rows)), device)
        return votes(similarity, bank.labels.to(device)[index], classes, temperature).argmax(dim=1).cpu()

    single = [predict(bank["vectors"][:, i], test["vectors"][:, i]) for i in range(test["vectors"].shape[1])]
    return torch.stack(single, dim=1), predict(bank["pooled"], test["pooled"]), test.labels


@contextlib.contextmanager
def vectors_of(encoder) -> Iterator[None]:
    """Make a pooling that averages its vectors also return them, inside the context."""
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
    """Draw the curves of one or several analyses into the charts of CHARTS, and logits -> {name: uint8 [H, W, 3]}.

    reports: legend entry -> report. Curves and charts that no report has are left out.
    """
    drawn = {}
    for name, (panels, x_name) in CHARTS.items():
        sheets = []
        for curve, title in panels:
            series = {
                model: [(x, y) for x, y in report.curves[curve] if y is not None]
                for model, report in reports.items()
                if report.curves.get(curve)
            }
            if series:
                sheets.append(line_chart(series, title, x_name=x_name))
        if sheets:
            drawn[name] = np.concatenate(sheets)
    charts = [token_logits.chart(model, report.curves) for model, report in reports.items()]
    if any(chart is not None for chart in charts):
        drawn["logits"] = np.concatenate([chart for chart in charts if chart is not None])
    return drawn


CHARTS = {
    "diversity": (
        (
            ("spatial_diversity", "feature variance over positions"),
            ("channel_diversity", "feature variance over channels"),
        ),
        "relative depth",
    ),
    "dead": (
        (
            ("dead_units", "dead neurons (%)"),
            ("dead_channels", "dead channels (%)"),
            ("silent", "inactive activations (%)"),
        ),
        "relative depth",
    ),
    "salient": (
        (
            ("salient_high", "top-1 without the most attended patches (%)"),
            ("salient_random", "top-1 without random patches (%)"),
        ),
        "masked patches (%)",
    ),
    "tokens": (
        (("token_error", "error of each token (%)"), ("token_variance", "disagreement with the joint prediction (%)")),
        "token",
    ),
}

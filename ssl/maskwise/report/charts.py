"""Charts of the page: which numbers of a run are drawn together, with lines to read them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from maskwise.engine import collapse_alarms as alarms
from maskwise.engine.run_curves import LOSSES, TARGETS, Points, curve, is_number, report_curve
from maskwise.functional.schedules import temperature
from maskwise.imaging.svg_charts import LineChart
from maskwise.recipe.recipe import Recipe
from maskwise.report.contents import Contents

MOST_NUMBERS = 8  # of one evaluation in one chart


@dataclass(frozen=True)
class Drawn:
    """A chart with its title and a remark."""

    title: str
    chart: LineChart
    remark: str = ""


@dataclass(frozen=True)
class Topic:
    """Numbers of logged steps that form one chart: key -> name of the curve.

    remark: how to read it; levels: lines to read it by, of a recipe; log: whether a wide range is drawn by logarithm.
    """

    title: str
    keys: Mapping[str, str]
    remark: str = ""
    levels: Callable[[Recipe], dict[str, float]] = field(default=lambda recipe: {})
    log: bool = False


def log_k(recipe: Recipe) -> dict[str, float]:
    """Return the entropy of targets without information, by prototypes."""
    top = None if recipe.learns_labels else alarms.log_of(recipe.head.prototypes)
    return {"ln K": top} if top else {}


def patch_log_k(recipe: Recipe) -> dict[str, float]:
    """Return the entropy of patch targets without information."""
    top = None if recipe.learns_labels else alarms.log_of(getattr(recipe.head, "patch_prototypes", None))
    return {"ln K": top} if top else log_k(recipe)


LOSS_PARTS = {**LOSSES, "loss": "loss", "pixel": "loss of pixels", "label": "loss of labels"}
TEMPERATURES = {"temp": "of whole crops", "patch_temp": "of patches"}  # not logged: by epoch, from the recipe
SCHEDULES = (
    Topic("Learning rate", {"lr": "lr"}),
    Topic("Weight decay", {"wd": "wd"}),
    Topic("Teacher momentum", {"momentum": "momentum"}),
    Topic("Teacher temperature", TEMPERATURES, "by epoch, from the recipe"),
)
COLLAPSE = (
    Topic(
        "Entropy of the CLS targets",
        TARGETS,
        "nats; the mean entropy at ln K: no information; the entropy of the mean near 0: one prototype for all",
        log_k,
    ),
    Topic(
        "Entropy of the patch targets",
        {f"patch_{name.removeprefix('teacher_')}": label for name, label in TARGETS.items()},
        "nats, of masked patches",
        patch_log_k,
    ),
    Topic(
        "Spread of the features",
        {"feature_std": "feature_std"},
        "standard deviation of unit features; 1: spread out, 0: all the same",
        lambda recipe: {"alarm below": alarms.CONSTANT},
    ),
    Topic(
        "Rank of the features",
        {"feature_rank": "feature_rank"},
        "participation ratio of one batch",
        lambda recipe: {"alarm below": alarms.LOW_RANK},
    ),
    Topic("Equal features", {"feature_duplicates": "share"}, "share of pairs of images with the same feature"),
    Topic("Agreement", {"agreement": "agreement"}, "share of images with the same first prototype in both views"),
    Topic(
        "Agreement of masks",
        {"mask_agreement": "mask_agreement"},
        "Fleiss' kappa; 0: independent of each other, 1: all images have the same patches masked",
        lambda recipe: {"alarm above": alarms.EQUAL_MASKS},
    ),
    Topic("Masked patches", {"mask_share": "mask_share"}, "share of all patches of the global crops"),
    Topic("Distance of teacher and student", {"teacher_gap": "teacher_gap"}, "relative to the student's weights"),
    Topic("Shift of the center", {"center_shift": "center_shift"}),
    Topic("Gradient norm", {"grad_norm": "grad_norm"}, "before clipping", log=True),
)
SPEED = (
    Topic("Images per second", {"img_s": "img/s"}),
    Topic("Waiting for data", {"data_wait": "share of the time"}),
    Topic("Skipped steps", {"skipped": "skipped"}, "with a loss or gradient that was not finite"),
)
LEFT_OUT = {"step", "epoch", "seconds"}
KNOWN = {key for topic in (*SCHEDULES, *COLLAPSE, *SPEED) for key in topic.keys} | {*LOSS_PARTS} | LEFT_OUT


def loss_topic(runs: Sequence[Contents]) -> Topic:
    """Return the chart of the loss with those parts that differ from it."""
    keys = {"loss": LOSS_PARTS["loss"]}
    for key, label in LOSS_PARTS.items():
        if any((points := topic_curve(run, key)) and points != topic_curve(run, "loss") for run in runs):
            keys[key] = label
    return Topic("Training loss", keys)


def other_topics(runs: Sequence[Contents]) -> list[Topic]:
    """Return a chart for each further number of the log, such as those of an external method."""
    keys = dict.fromkeys(key for run in runs for record in run.trained for key in record if key not in KNOWN)
    return [Topic(key, {key: key}) for key in keys if any(curve(run.run.records, key) for run in runs)]


def topic_charts(topics: Sequence[Topic], runs: Sequence[Contents], names: Sequence[str]) -> list[Drawn]:
    """Draw topics: of one run a chart each, of several a chart for each number with a curve per run.

    Numbers that are 0 at every step, such as those of masks without masking, are left out.
    """
    drawn = []
    for topic in topics:
        if len(runs) == 1:
            [run] = runs
            series = {label: points for key, label in topic.keys.items() if (points := topic_curve(run, key))}
            levels = topic.levels(run.run.recipe) if run.run.recipe else {}
            if series:
                drawn.append(Drawn(topic.title, line_chart(runs, series, levels, topic.log), topic.remark))
            continue
        for key, label in topic.keys.items():
            series = {name: points for name, run in zip(names, runs) if (points := topic_curve(run, key))}
            title = topic.title if len(topic.keys) == 1 else f"{topic.title}: {label}"
            if series:
                drawn.append(Drawn(title, line_chart(runs, series, {}, topic.log), topic.remark))
    return drawn


def topic_curve(run: Contents, key: str) -> Points:
    """Return the curve of a number of the log or of a temperature; [] where it is 0 at every step."""
    points = temperatures(run, key) if key in TEMPERATURES else curve(run.run.records, key)
    return points if any(value != 0 for _, value in points) else []


def temperatures(run: Contents, key: str) -> Points:
    """Return the teacher temperature at each logged step, by the recipe; [] for methods without one."""
    recipe = run.run.recipe
    if recipe is None or recipe.learns_labels or (key == "patch_temp" and "teacher.patch_temp" not in recipe.values):
        return []
    teacher, options, hold = recipe.teacher, recipe.method.keywords(), 0
    warm_epochs = teacher.warmup_temp_epochs
    warm, final = teacher.warmup_temp, teacher.temp
    if key == "patch_temp":
        warm, final, hold = teacher.warmup_patch_temp, teacher.patch_temp, options.get("start_epoch", 0)
        if (own := options.get("warmup_patch_temp_epochs")) is not None:
            warm_epochs = own
    records = [record for record in run.trained if is_number(record.get("epoch"))]
    return [(record["step"], temperature(record["epoch"], warm, final, warm_epochs, hold)) for record in records]


def line_chart(runs: Sequence[Contents], series, levels=None, log: bool = False) -> LineChart:
    """Return a chart over the steps of all runs, with the alarms of a single one as marks."""
    last = max((run.run.step for run in runs), default=0)
    marks = [(step, f"alarm: {kind}") for step, kind, _ in runs[0].raised] if len(runs) == 1 else []
    return LineChart(series, levels or {}, marks, (0, max(1, last)), log)


def knn_chart(runs: Sequence[Contents], names: Sequence[str]) -> Drawn | None:
    """Draw the k-NN accuracy with the baselines that all runs share; None where no run has measured it."""
    curves = {name: report_curve(run.run.records, "knn", "top1") for name, run in zip(names, runs)}
    series = {name if len(runs) > 1 else "teacher": points for name, points in curves.items() if points}
    if not series:
        return None
    first = runs[0].baselines
    shared = {name: value for name, value in first.items() if all(run.baselines.get(name) == value for run in runs)}
    return Drawn("k-NN top-1 (%)", line_chart(runs, series, shared), knn_remark(runs[0].protocol))


def knn_remark(protocol: dict) -> str:
    """Return the protocol of k-NN in a line."""
    texts = {"headline_k": "k = {}", "bank": "bank of {} images", "queries": "{} queries"}
    return ", ".join(text.format(protocol[key]) for key, text in texts.items() if key in protocol)


def evaluation_charts(runs: Sequence[Contents], names: Sequence[str]) -> list[Drawn]:
    """Draw the numbers of every other evaluation on the way."""
    reports = dict.fromkeys(
        record["report"]
        for run in runs
        for record in run.run.records
        if isinstance(record.get("report"), str) and record["report"] != "knn"
    )
    drawn = []
    for report in reports:
        keys = dict.fromkeys(
            key
            for run in runs
            for record in run.run.records
            if record.get("report") == report
            for key in record["numbers"]
        )
        curves = {key: [report_curve(run.run.records, report, key) for run in runs] for key in keys}
        shown = [(key, found) for key, found in curves.items() if any(found)][:MOST_NUMBERS]
        if len(runs) == 1 and shown:
            drawn.append(Drawn(report, line_chart(runs, {key: points for key, [points] in shown})))
        elif shown:
            key, found = shown[0]
            series = {name: points for name, points in zip(names, found) if points}
            drawn.append(Drawn(f"{report}: {key}", line_chart(runs, series)))
    return drawn

"""Diagnose a run folder: is the run healthy, and if not, what is wrong and what to change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from maskwise.data.loader import steps_per_epoch
from maskwise.doctor.bottleneck import bottleneck
from maskwise.engine.checkpoint import Damaged, directories, read
from maskwise.engine.collapse_alarms import ALARMS, Alarm, CollapseAlarms
from maskwise.engine.run_log import BAD_BATCHES, BAD_IMAGES, read_metrics, read_unreadable
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe

FEW_SKIPPED = 0.01  # share of skipped steps up to which a run is healthy
# alarms from cause to consequence: an earlier one explains the later ones
CAUSE_ORDER = (
    "student_equals_teacher",
    "stale_teacher",
    "constant_features",
    "duplicate_features",
    "rank_collapse",
    "single_prototype",
    "uniform_targets",
    "loss_at_log_k",
    "single_patch_prototype",
    "uniform_patch_targets",
    "identical_masks",
    "knn",
)


@dataclass(frozen=True)
class Diagnosis:
    """Facts (name, value) and findings, the worst first; a run without findings is healthy."""

    facts: list[tuple[str, str]]
    findings: list[Alarm]

    @property
    def kinds(self) -> list[str]:
        """Kinds of the findings, causes before consequences."""
        return [finding.kind for finding in self.findings]

    def text(self) -> str:
        """Return the lines that `maskwise doctor RUN` prints."""
        verdict = "healthy"
        if self.findings:
            first, *others = self.kinds
            verdict = first + (f"; also {', '.join(others)}" if others else "")
        lines = [f"{name:<12} {value}" for name, value in [*self.facts, ("verdict", verdict)]]
        return "\n".join([*lines, *(f"  - {finding.kind}: {finding.text}" for finding in self.findings)])


def is_run(path) -> bool:
    """Whether a path is the folder of a run that has started to train."""
    return Path(path).is_dir() and (Path(path) / "recipe.yaml").is_file() and (Path(path) / "metrics.jsonl").is_file()


def diagnose(folder, *overrides: str) -> Diagnosis:
    """Read the metrics, reports, checkpoints and lists of a run folder; nothing is written.

    overrides: as for `read_recipe`; giving any permits code that the recipe names. Raises UserError if the path is not
    a run folder.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(
            f"{folder} is not the folder of a run that has started (it has no recipe.yaml and metrics.jsonl); "
            "give the --out of a training run"
        )
    recipe, lines = read_recipe(folder, *overrides), read_metrics(folder / "metrics.jsonl")
    run = run_information(folder)
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return Diagnosis([("run", str(folder)), ("steps", "no step was logged yet")], [])
    batch = recipe.train.batch_size
    per_epoch = max(1, steps_per_epoch(int(run.get("images", batch)), batch))
    total = recipe.train.steps or recipe.train.epochs * per_epoch
    skipped_fact, _ = skipped_steps(folder, trained)
    checkpoint_fact, damaged = checkpoints(folder)
    facts = [
        ("run", f"{folder}: {network_text(recipe)}"),
        ("steps", progress(folder, trained[-1]["step"], total)),
        ("loss", loss_text(trained)),
        ("speed", speed_text(trained, workers=uses_workers(recipe, run), labels=recipe.learns_labels)),
        ("skipped", skipped_fact),
        ("checkpoints", checkpoint_fact),
        ("images", unreadable_text(folder)),
        *knn_fact(lines),
    ]
    return Diagnosis(facts, [*log_alarms(folder, recipe, lines, run, total), *damaged])


def log_alarms(folder: Path, recipe: Recipe, lines: list[dict], run: dict, total: int) -> list[Alarm]:
    """Return the alarms that hold at the end of a log, skipped steps first; run: run.json; total: steps of the run."""
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return []
    crops = 2 * recipe.train.batch_size // int(run.get("ranks", 1)) // recipe.train.accumulate
    return [*skipped_steps(folder, trained)[1], *lasting_alarms(recipe, lines, total, crops)]


def run_information(folder: Path) -> dict:
    """Content of run.json: images, ranks, device ...; empty if it cannot be read."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def network_text(recipe: Recipe) -> str:
    """Method, masking (of a self-supervised run), backbone and pooling in words."""
    masking = "" if recipe.learns_labels else f", masking {recipe.masking.name}"
    return f"{recipe.method.name}{masking}, {recipe.backbone.name}, pooling {recipe.pooling.name}"


def progress(folder: Path, step: int, total: int) -> str:
    """Steps done, and whether the run has ended."""
    if step >= total:
        return f"{step} of {total}, complete"
    if (folder / "preempted").is_file():
        return f"{step} of {total}, interrupted and saved: the same command continues"
    return f"{step} of {total}, running or crashed: the same command continues from the last checkpoint"


def loss_text(trained: list[dict]) -> str:
    """The loss at the first and the last logged step where it was finite."""
    finite = [line for line in trained if line["loss"] is not None]
    if not finite:
        return "never finite"
    first, last = finite[0], finite[-1]
    return f"{first['loss']:.3g} at step {first['step']}, {last['loss']:.3g} at step {last['step']}"


def uses_workers(recipe: Recipe, run: dict) -> bool:
    """Whether data workers load in parallel with the step: requested, or chosen by default as on a GPU."""
    return recipe.speed.workers != 0 and (recipe.speed.workers != "auto" or "CPU" not in run.get("device", "CPU"))


def speed_text(trained: list[dict], *, workers: bool, labels: bool) -> str:
    """Images per second, the share of the time spent waiting for data, and the bottleneck."""
    recent = trained[1:][-50:] or trained
    rate, waiting = median(line["img_s"] for line in recent), median(line["data_wait"] for line in recent)
    limit = bottleneck(waiting, workers=workers, labels=labels)
    return f"{rate:.3g} img/s, {100 * waiting:.0f} % of the time waiting for data; {limit}"


def lasting_alarms(recipe: Recipe, lines: list[dict], total: int, crops_per_batch: int) -> list[Alarm]:
    """Alarms of the logged lines that still hold at the end, in CAUSE_ORDER, with the recipe's values."""
    monitor = CollapseAlarms(
        recipe.values.get("head.prototypes"),
        patch_prototypes=getattr(recipe.head, "patch_prototypes", None),
        crops_per_batch=crops_per_batch,
        total_steps=total,
    )
    raised: dict[str, tuple[int, str]] = {}
    for line in lines:
        for alarm in line_alarms(monitor, line):
            if alarm.kind != "skipped":
                raised[alarm.kind] = (line["step"], alarm.text)
    alarms = []
    for kind in sorted(raised, key=CAUSE_ORDER.index):
        step, text = raised[kind]
        if kind not in ALARMS or ALARMS[kind][0](monitor):
            values = f"; here {RECIPE_VALUES[kind](recipe)}" if kind in RECIPE_VALUES else ""
            alarms.append(Alarm(kind, f"{text} (since step {step}{values})"))
    return alarms


def line_alarms(monitor: CollapseAlarms, line: dict) -> list[Alarm]:
    """Alarms that one line of metrics.jsonl raises."""
    if "loss" in line:
        return monitor.check(line)
    if "report" in line:
        return monitor.check_evaluation(line["step"], line["report"], line["numbers"])
    return []


# the recipe's values that an alarm is about
RECIPE_VALUES: dict[str, Callable[[Recipe], str]] = {
    "student_equals_teacher": lambda recipe: f"optimizer.lr is {recipe.optimizer.lr:g}",
    "stale_teacher": lambda recipe: f"teacher.momentum is {recipe.teacher.momentum:g}",
    "single_prototype": lambda recipe: (
        f"method.center_momentum is {recipe.method.keywords().get('center_momentum', 0.9):g}, "
        f"teacher.temp {recipe.teacher.temp:g}"
    ),
    "uniform_targets": lambda recipe: f"teacher.temp is {recipe.teacher.temp:g}",
    "loss_at_log_k": lambda recipe: f"teacher.temp is {recipe.teacher.temp:g}, optimizer.lr {recipe.optimizer.lr:g}",
    "rank_collapse": lambda recipe: f"head.prototypes is {recipe.head.prototypes}",
    "uniform_patch_targets": lambda recipe: f"teacher.patch_temp is {recipe.teacher.patch_temp:g}",
    "single_patch_prototype": lambda recipe: f"teacher.patch_temp is {recipe.teacher.patch_temp:g}",
    "identical_masks": lambda recipe: f"masking is {recipe.masking.name}",
}


def skipped_steps(folder: Path, trained: list[dict]) -> tuple[str, list[Alarm]]:
    """Count of skipped steps, their causes, and the images that were in all of them."""
    steps, count = trained[-1]["step"], trained[-1].get("skipped", 0)
    if not count:
        return f"0 of {steps} steps", []
    batches = read_metrics(folder / BAD_BATCHES)
    causes = Counter(cause for batch in batches for cause in batch["causes"])
    cause_text = ", ".join(f"{cause} {times} times" for cause, times in causes.most_common())
    fact = f"{count} of {steps} steps" + (f" (not finite: {cause_text}; see {BAD_BATCHES})" if cause_text else "")
    if count <= FEW_SKIPPED * steps:
        return fact, []
    common: set[int] = set()
    if len(batches) > 1:
        common = set.intersection(*({i for rank in batch["sample_ids"] for i in rank} for batch in batches))
    common_text = ""
    if common:
        common_text = f"; images {', '.join(map(str, sorted(common)[:5]))} were in every bad batch: check them"
    text = (
        f"{count} of {steps} steps were skipped because the loss or gradient was not finite: lower optimizer.lr, "
        f"set train.precision=fp32, or repair the images{common_text}"
    )
    return fact, [Alarm("skipped", text)]


def checkpoints(folder: Path) -> tuple[str, list[Alarm]]:
    """Count of checkpoints, and those that are damaged."""
    paths = directories(folder / "checkpoints")[::-1]
    damaged = {}
    for path in paths:
        try:
            read(path)
        except Damaged as error:
            damaged[path.name] = str(error)
    if not paths:
        return "none yet", []
    fact = f"{len(paths)}, the last at step {int(paths[-1].name.removeprefix('step_'))}"
    if not damaged:
        return f"{fact}, all intact", []
    errors = "; ".join(f"{name}: {error}" for name, error in damaged.items())
    remedy = "restore one from a copy, or start again in another folder"
    if len(damaged) < len(paths):
        remedy = "the run continues from the newest intact one"
    return f"{fact}, {len(damaged)} damaged", [Alarm("checkpoint", f"{errors}: check the disk; {remedy}")]


def unreadable_text(folder: Path) -> str:
    """Count of images that were replaced because they could not be read; a run with too many of them stops."""
    if not (folder / BAD_IMAGES).is_file():
        return "all could be read"
    count = len(read_unreadable(folder / BAD_IMAGES))
    return f"{count} could not be read and were replaced: see {folder / BAD_IMAGES}"


def knn_fact(lines: list[dict]) -> list[tuple[str, str]]:
    """k-NN accuracy: every value, or the first, the best and the last of many."""
    accuracies = [
        (line["step"], line["numbers"]["top1"])
        for line in lines
        if line.get("report") == "knn" and "top1" in line["numbers"]
    ]
    if not accuracies:
        return []
    if len(accuracies) > 3:
        accuracies = [accuracies[0], max(accuracies, key=lambda item: item[1]), accuracies[-1]]
    return [("k-NN", ", ".join(f"{top1:.1f} % at step {step}" for step, top1 in accuracies))]

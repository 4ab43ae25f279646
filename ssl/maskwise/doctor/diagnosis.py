"""What a run folder tells of the run: is it healthy, and if not, what is wrong and what to change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from maskwise.data.loader import steps_per_epoch
from maskwise.engine.bad_images import LIST
from maskwise.engine.checkpoint import Damaged, read
from maskwise.engine.health import SIGNS, Alarm, Health
from maskwise.engine.journal import BAD_BATCHES, read_metrics
from maskwise.functional.errors import UserError
from maskwise.recipe import Recipe, read_recipe

FEW_SKIPPED = 0.01  # share of the steps that may be left out in a run that is still called healthy
WAITING = {True: 0.2, False: 0.5}  # share of waiting from which on the data are the brake: with data workers, and without
# signs in the order of cause and consequence: what comes first explains what comes after
ROOTS = ("same", "teacher", "flat", "twins", "line", "point", "uniform", "stuck", "patch_point", "patch_uniform", "masks", "knn")


@dataclass(frozen=True)
class Diagnosis:
    """Facts (what, how much) and findings, the worst first; a run without findings is healthy."""

    facts: list[tuple[str, str]]
    findings: list[Alarm]

    @property
    def kinds(self) -> list[str]:
        """The kinds of the findings, the cause before its consequences."""
        return [finding.kind for finding in self.findings]

    def text(self) -> str:
        """What `maskwise doctor RUN` prints."""
        verdict = "healthy" if not self.findings else self.findings[0].kind + (f"; also {', '.join(self.kinds[1:])}" if self.findings[1:] else "")
        lines = [f"{what:<12} {value}" for what, value in [*self.facts, ("verdict", verdict)]]
        return "\n".join([*lines, *(f"  - {finding.kind}: {finding.text}" for finding in self.findings)])


def is_run(path) -> bool:
    """Whether a path is a run folder that has begun to train."""
    return Path(path).is_dir() and (Path(path) / "recipe.yaml").is_file() and (Path(path) / "metrics.jsonl").is_file()


def diagnose(folder, *overrides: str) -> Diagnosis:
    """Read a run folder: its metrics, reports, checkpoints and lists; nothing is written. `overrides` as for `read_recipe`: with them the
    user stands for code that the recipe names. Raises UserError for what is not a run folder.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(f"{folder} is not the folder of a run that has begun (it has no recipe.yaml and metrics.jsonl); give the --out of a training run")
    recipe, lines = read_recipe(folder, *overrides), read_metrics(folder / "metrics.jsonl")
    try:
        about = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        about = {}
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return Diagnosis([("run", str(folder)), ("steps", "no step was logged yet")], [])
    batch, ranks = recipe.train.batch_size, int(about.get("ranks", 1))
    total = recipe.train.steps or recipe.train.epochs * max(1, steps_per_epoch(int(about.get("images", batch)), batch))
    facts = [
        ("run", f"{folder}: {recipe.method.name}, masking {recipe.masking.name}, {recipe.backbone.name}, pooling {recipe.pooling.name}"),
        ("steps", progress(folder, trained[-1]["step"], total)),
        ("loss", curve(trained)),
        ("speed", speed(trained, beside(recipe, about))),
    ]
    findings = signs(recipe, lines, total, 2 * batch // ranks // recipe.train.accumulate)
    for what, examine in (("skipped", lambda: skipped(folder, trained)), ("checkpoints", lambda: checkpoints(folder)), ("images", lambda: unreadable(folder))):
        fact, found = examine()
        facts.append((what, fact))
        findings = [*found, *findings] if what == "skipped" else [*findings, *found]
    if tops := [(line["step"], line["numbers"]["top1"]) for line in lines if line.get("report") == "knn" and "top1" in line["numbers"]]:
        facts.append(("k-NN", ", ".join(f"{top:.1f} % at step {step}" for step, top in (tops if len(tops) < 4 else [tops[0], max(tops, key=lambda each: each[1]), tops[-1]]))))
    return Diagnosis(facts, findings)


def progress(folder: Path, step: int, total: int) -> str:
    """How far the run is."""
    if step >= total:
        return f"{step} of {total}, complete"
    if (folder / "preempted").is_file():
        return f"{step} of {total}, interrupted and saved: the same command continues"
    return f"{step} of {total}, running or broken off: the same command continues from the last checkpoint"


def curve(trained: list[dict]) -> str:
    """The loss at the first and the last logged step that were finite."""
    finite = [line for line in trained if line["loss"] is not None]
    if not finite:
        return "never finite"
    first, last = finite[0], finite[-1]
    return f"{first['loss']:.3g} at step {first['step']}, {last['loss']:.3g} at step {last['step']}"


def beside(recipe: Recipe, about: dict) -> bool:
    """Whether data workers load beside the step: asked for, or chosen, as they are on a GPU."""
    return recipe.speed.workers != 0 and (recipe.speed.workers != "auto" or "CPU" not in about.get("device", "CPU"))


def speed(trained: list[dict], workers: bool) -> str:
    """Images a second, and whether the data or the computing are the brake."""
    recent = trained[1:][-50:] or trained
    rate, waiting = median(line["img_s"] for line in recent), median(line["data_wait"] for line in recent)
    if waiting > WAITING[workers]:
        bound = "data-bound: more speed.workers, smaller image files, or tar shards would help; a faster device would not"
    else:
        bound = "compute-bound: fewer or smaller crops, a smaller backbone or a faster device would help; faster loading would not"
    return f"{rate:.3g} img/s, {100 * waiting:.0f} % of the time waiting for data; {bound}"


def signs(recipe: Recipe, lines: list[dict], total: int, rows: int) -> list[Alarm]:
    """The alarms that the logged lines raise and that hold to their end, the cause first, each with what the recipe says of it."""
    head = recipe.head
    health = Health(head.prototypes, patch_prototypes=getattr(head, "patch_prototypes", None), rows=rows, total_steps=total)
    raised: dict[str, tuple[int, str]] = {}
    for line in lines:
        for alarm in health.check(line) if "loss" in line else health.judge(line["step"], line["report"], line["numbers"]) if "report" in line else []:
            if alarm.kind != "skipped":
                raised[alarm.kind] = (line["step"], alarm.text)
    found = []
    for kind in sorted(raised, key=ROOTS.index):
        step, text = raised[kind]
        if kind not in SIGNS or SIGNS[kind][0](health):
            here = HERE.get(kind, lambda recipe: "")(recipe)
            found.append(Alarm(kind, f"{text} (since step {step}{'; here ' + here if here else ''})"))
    return found


# what in the recipe speaks for a sign
HERE: dict[str, Callable[[Recipe], str]] = {
    "same": lambda recipe: f"optimizer.lr is {recipe.optimizer.lr:g}",
    "teacher": lambda recipe: f"teacher.momentum is {recipe.teacher.momentum:g}",
    "point": lambda recipe: f"method.center_momentum is {recipe.method.keywords().get('center_momentum', 0.9):g}, teacher.temp {recipe.teacher.temp:g}",
    "uniform": lambda recipe: f"teacher.temp is {recipe.teacher.temp:g}",
    "stuck": lambda recipe: f"teacher.temp is {recipe.teacher.temp:g}, optimizer.lr {recipe.optimizer.lr:g}",
    "line": lambda recipe: f"head.prototypes is {recipe.head.prototypes}",
    "patch_uniform": lambda recipe: f"teacher.patch_temp is {recipe.teacher.patch_temp:g}",
    "patch_point": lambda recipe: f"teacher.patch_temp is {recipe.teacher.patch_temp:g}",
    "masks": lambda recipe: f"masking is {recipe.masking.name}",
}  # fmt: skip


def skipped(folder: Path, trained: list[dict]) -> tuple[str, list[Alarm]]:
    """Steps that were left out, why, and images that were in all of them."""
    steps, count = trained[-1]["step"], trained[-1].get("skipped", 0)
    if not count:
        return f"0 of {steps} steps", []
    bad = read_metrics(folder / BAD_BATCHES)
    causes = Counter(cause for each in bad for cause in each["causes"])
    why = ", ".join(f"{cause} {times} times" for cause, times in causes.most_common())
    common = set.intersection(*({i for rank in each["sample_ids"] for i in rank} for each in bad)) if len(bad) > 1 else set()
    fact = f"{count} of {steps} steps" + (f" (not finite: {why}; see {BAD_BATCHES})" if why else "")
    if count <= FEW_SKIPPED * steps:
        return fact, []
    blamed = f"; images {', '.join(map(str, sorted(common)[:5]))} were in every bad batch: look at them" if common else ""
    text = f"{count} of {steps} steps had a loss or gradient that is not finite and taught nothing: lower optimizer.lr, set train.precision=fp32, or repair the images{blamed}"
    return fact, [Alarm("skipped", text)]


def checkpoints(folder: Path) -> tuple[str, list[Alarm]]:
    """Whether the checkpoints are whole."""
    paths = sorted((folder / "checkpoints").glob("step_*"))
    damaged = {}
    for path in paths:
        try:
            read(path)
        except Damaged as fault:
            damaged[path.name] = str(fault)
    fact = f"{len(paths)}, the last at step {int(paths[-1].name.removeprefix('step_'))}" if paths else "none yet"
    if not damaged:
        return fact + (", all sound" if paths else ""), []
    told = "; ".join(f"{name}: {fault}" for name, fault in damaged.items())
    remedy = "the run continues from the newest sound one" if len(damaged) < len(paths) else "restore one from a copy, or start anew in another folder"
    return f"{fact}, {len(damaged)} damaged", [Alarm("checkpoint", f"{told}: look at the disk; {remedy}")]


def unreadable(folder: Path) -> tuple[str, list[Alarm]]:
    """Images that were replaced because they could not be read: a fact, no fault (the loader stops a run that meets too many)."""
    if (folder / LIST).is_file():
        return f"{len((folder / LIST).read_text().splitlines())} could not be read and were replaced: see {folder / LIST}", []
    return "all could be read", []

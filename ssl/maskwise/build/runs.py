"""Runs below a folder: their state by their files, what they learned and cost, and what two of them differ in."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from maskwise.build.running.run_folder import read_run, recipe_of
from maskwise.data.loader import steps_per_epoch
from maskwise.engine.run_curves import ACCURACY, LOSSES, curve, is_number, report_curve
from maskwise.engine.run_end import FAILED, PREEMPTED
from maskwise.engine.run_lock import holder
from maskwise.engine.run_log import read_metrics
from maskwise.errors import UserError
from maskwise.imaging.charts import line_chart
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import nearest

SILENT = 1200.0  # seconds without a heartbeat after which a run on another machine counts as ended
STATES = ("running", "preempted", "complete", "failed")
# numbers of `maskwise report` and of `maskwise baselines`
BASELINES = {"run_report": r"knn_(?:untrained_pooled|pixels|chance)", "baselines": r"(?:\w+_top1_k20|chance)"}
RATE_RECORDS = 10  # logged steps whose median is the rate
RESULT_KEYS = ("data.path", "data.root", "data.test_path", "train.log_every", "train.save_every", "train.keep")


@dataclass(frozen=True)
class Run:
    """One run: see the columns of `maskwise runs` in docs/runs.md; None where a file does not tell.

    changes: {key: (value of the parent, value here)}; values: the resolved recipe; records: those of metrics.jsonl.
    """

    path: str
    state: str
    note: str = ""
    step: int = 0
    steps: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    loss: float | None = None
    knn: float | None = None
    knn_step: int | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    img_s: float | None = None
    hours: float | None = None
    device: str | None = None
    ranks: int | None = None
    commit: str | None = None
    started: str | None = None
    parent: str | None = None
    changes: dict[str, tuple[str, str]] = field(default_factory=dict)
    recipe: Recipe | None = field(default=None, repr=False, compare=False)
    records: list[dict] = field(default_factory=list, repr=False, compare=False)

    def row(self) -> dict:
        """Return all values but the recipe and the records."""
        names = [own.name for own in fields(self) if own.name not in ("recipe", "records")]
        return {name: value for name, value in asdict_of(self).items() if name in names}

    def value(self, key: str):
        """Return a column, a baseline or a recipe value by name; None where this run has none."""
        if key in COLUMNS:
            return getattr(self, key)
        if key in self.baselines:
            return self.baselines[key]
        return None if self.recipe is None else self.recipe.values.get(key)


COLUMNS = tuple(own.name for own in fields(Run) if own.name not in ("recipe", "records", "baselines", "changes"))


def asdict_of(run: Run) -> dict:
    """Return the fields of a run that are numbers, texts and tables of these."""
    plain = {own.name: getattr(run, own.name) for own in fields(run) if own.name not in ("recipe", "records")}
    return {**plain, "alarms": list(run.alarms), "changes": {key: list(pair) for key, pair in run.changes.items()}}


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / "recipe.yaml").is_file() and ((folder / "run.json").is_file() or (folder / "checkpoints").is_dir())


def find_runs(folder) -> list[Path]:
    """Return the folders of all runs at or below a folder, sorted; links to folders are not followed.

    Raises UserError where there is none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the runs")
    found = []
    for place, folders, _ in os.walk(folder):
        if is_run(Path(place)):
            found.append(Path(place))
            folders.clear()
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]
    if not found:
        raise UserError(f"{folder} holds no runs (folders with recipe.yaml and run.json); give the folder above them")
    return sorted(found)


def read_run_folder(folder: Path, name: str | None = None) -> Run:
    """Read one run; nothing is written. Files that cannot be read leave their values out."""
    about, note = read_run(folder), ""
    recipe = None
    try:
        recipe = read_recipe(folder, try_model=False)
    except UserError as error:
        note = str(error).split("\n")[0]
    records = []
    with contextlib.suppress(OSError):
        records = read_metrics(folder / "metrics.jsonl")
    trained = [record for record in records if "loss" in record]
    last = trained[-1] if trained else {}
    step = max((record.get("step", 0) for record in records), default=0)
    steps = per_epoch = None
    if recipe is not None:
        per_epoch = max(1, steps_per_epoch(int(about.get("images", recipe.train.batch_size)), recipe.train.batch_size))
        steps = recipe.train.steps or recipe.train.epochs * per_epoch
    state, reason = state_of(folder, steps)
    knn = [record for record in records if record.get("report") == "knn" and "top1" in record.get("numbers", {})]
    rates = [record["img_s"] for record in trained[-RATE_RECORDS:] if record.get("img_s")]
    start = (about.get("starts") or [about])[-1]
    parent, changes = changes_of(about.get("recipe") or recipe_of(folder), recipe)
    return Run(
        path=name or str(folder),
        state=state,
        note=reason or note,
        step=step,
        steps=steps,
        epoch=round(step / per_epoch, 2) if per_epoch else None,
        epochs=recipe.train.epochs if recipe is not None and recipe.train.steps is None else None,
        loss=last.get("loss"),
        knn=knn[-1]["numbers"]["top1"] if knn else None,
        knn_step=knn[-1]["step"] if knn else None,
        baselines=baselines_of(folder, knn),
        alarms=tuple(dict.fromkeys(record["kind"] for record in records if "alarm" in record and "kind" in record)),
        img_s=round(float(np.median(rates)), 2) if rates else None,
        hours=round(last["seconds"] * start.get("ranks", 1) / 3600, 4) if "seconds" in last else None,
        device=start.get("device"),
        ranks=start.get("ranks"),
        commit=start.get("commit"),
        started=about.get("started"),
        parent=parent,
        changes=changes,
        recipe=recipe,
        records=records,
    )


def state_of(folder: Path, steps: int | None) -> tuple[str, str]:
    """Return the state of a run and a remark: by its lock and heartbeat, last checkpoint, and files of its end."""
    held = holder(folder)
    if held is not None and (held.alive or (held.alive is None and held.silent < SILENT)):
        quiet = f", last sign {held.silent / 60:.0f} min ago" if held.silent > SILENT / 4 else ""
        return "running", f"{held.text}{quiet}"
    if steps is not None and (folder / "checkpoints" / f"step_{steps:08d}").is_dir():
        return "complete", ""
    if (folder / PREEMPTED).is_file():
        return "preempted", "the same command continues"
    with contextlib.suppress(OSError):
        return "failed", (folder / FAILED).read_text(encoding="utf-8").strip()
    return "failed", f"killed ({held.text})" if held is not None else "killed, or never started to train"


def baselines_of(folder: Path, knn: list[dict]) -> dict[str, float]:
    """Return the k-NN accuracies to compare with: before the first step, and those of reports."""
    baselines = {"knn_first": knn[0]["numbers"]["top1"]} if knn and knn[0]["step"] == 0 else {}
    for report, pattern in BASELINES.items():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            numbers = json.loads((folder / "reports" / f"{report}.json").read_text(encoding="utf-8"))["numbers"]
            baselines |= {key: value for key, value in numbers.items() if re.fullmatch(pattern, key)}
    return baselines


def changes_of(source: str | None, recipe: Recipe | None) -> tuple[str | None, dict[str, tuple[str, str]]]:
    """Return the name of the recipe that a run was started from, and the values that the run changes."""
    if source is None:
        return None, {}
    name = source.removeprefix("configs/").removesuffix(".yaml")
    if recipe is None:
        return name, {}
    try:
        return name, read_recipe(source, try_model=False).changes(recipe)
    except UserError:  # a file that is not here any more, or that asks for code of its own
        return name, {}


def sorted_runs(runs: Sequence[Run], key: str) -> list[Run]:
    """Sort runs by a column, a baseline or a recipe key; `-KEY` with the largest first, runs without one last.

    Raises UserError for a key that no run has.
    """
    reverse, key = key.startswith("-"), key.removeprefix("-")
    check_key(runs, key)
    having = [run for run in runs if run.value(key) is not None]
    values = [run.value(key) for run in having]
    as_number = all(isinstance(value, (int, float)) for value in values)
    having.sort(key=lambda run: run.value(key) if as_number else str(run.value(key)), reverse=reverse)
    return [*having, *(run for run in runs if run.value(key) is None)]


CONDITION = re.compile(r"([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.*)")
COMPARE: dict[str, Callable] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
}


def filtered(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """Keep the runs that meet all conditions such as state=failed, knn>30 or masking.name!=none.

    Raises UserError for a condition that cannot be read and a key that no run has.
    """
    for text in conditions:
        match = CONDITION.fullmatch(text)
        if match is None:
            raise UserError(f"--where {text}: write KEY=VALUE, KEY!=VALUE, KEY<NUMBER or KEY>NUMBER")
        key, sign, wanted = match.groups()
        check_key(runs, key)
        if sign in COMPARE:
            try:
                limit = float(wanted)
            except ValueError:
                raise UserError(f"--where {text}: {wanted!r} is no number") from None
            runs = [run for run in runs if is_number(run.value(key)) and COMPARE[sign](run.value(key), limit)]
        else:
            runs = [run for run in runs if matches(run.value(key), wanted) == (sign == "=")]
    return list(runs)


def matches(value, wanted: str) -> bool:
    """Return whether a value is the one written; of a list, whether it is one of them."""
    if isinstance(value, tuple):
        return wanted in map(str, value)
    if is_number(value):
        with contextlib.suppress(ValueError):
            return float(value) == float(wanted)
    return str(value).lower() == wanted.lower()


def check_key(runs: Sequence[Run], key: str) -> None:
    """Raise UserError for a key that is no column and that no run has."""
    known = dict.fromkeys(COLUMNS)
    for run in runs:
        known |= dict.fromkeys(run.baselines)
        known |= dict.fromkeys(run.recipe.values if run.recipe is not None else ())
    if runs and key not in known:
        raise UserError(f"no run has {key}{nearest(key, known)}; columns are {', '.join(COLUMNS)}, and recipe keys")


def as_csv(runs: Sequence[Run]) -> str:
    """Return the runs as a table; lists and tables in cells are JSON."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(Run("", "").row()), lineterminator="\n")
    table.writeheader()
    for run in runs:
        cells = run.row().items()
        table.writerow({key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in cells})
    return text.getvalue()


def differences(*runs: Run) -> dict[str, tuple[str, ...]]:
    """Return {key: value of each run} where recipes differ, section speed left out.

    Raises UserError for a recipe that is unreadable.
    """
    for run in runs:
        if run.recipe is None:
            raise UserError(f"{run.path}: {run.note}")
    first, *others = [run.recipe for run in runs if run.recipe is not None]
    changes = [first.changes(other) for other in others]
    values = {}
    for key in dict.fromkeys(key for changed in changes for key in changed):
        here = next(changed[key][0] for changed in changes if key in changed)
        values[key] = (here, *(changed[key][1] if key in changed else here for changed in changes))
    return values


def comparison(first: Run, second: Run) -> np.ndarray:
    """Draw losses and k-NN accuracy of two runs over the steps -> uint8 [H, W, 3].

    Raises UserError where neither has logged a step.
    """
    names = distinct_names([first.path, second.path])
    charts = []
    for key, title in LOSSES.items():
        series = {name: curve(run.records, key) for name, run in zip(names, (first, second))}
        if all(series.values()) or (key == "loss" and any(series.values())):
            charts.append(line_chart(series, title, x_name="step"))
    accuracy = {name: report_curve(run.records, "knn", "top1") for name, run in zip(names, (first, second))}
    if any(accuracy.values()):
        charts.append(line_chart(accuracy, ACCURACY, x_name="step"))
    if not charts:
        raise UserError(f"neither {first.path} nor {second.path} has logged a step; there is nothing to draw")
    return np.concatenate(charts)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths that tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]

"""Everything that the page shows of one run, read from the files of its folder; nothing is written."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from maskwise.build.running.run_folder import read_run
from maskwise.build.runs import Run, is_run, read_run_folder
from maskwise.compat import RENAMED_ALARMS
from maskwise.doctor.diagnose import log_alarms
from maskwise.engine.collapse_alarms import Alarm
from maskwise.engine.run_log import read_records
from maskwise.errors import UserError
from maskwise.evaluation.baselines import NAME, rows
from maskwise.evaluation.report import Report
from maskwise.recipe.reading import read_recipe
from maskwise.report.pictures import Frame, read_pictures

MEASURED = "run_report"  # the report that `maskwise report --measure` keeps
# its numbers, where the run has no report of baselines
MEASURED_ROWS = {
    "untrained network": ("knn_untrained_pooled", "knn_untrained_patch_mean"),
    "raw pixels": ("knn_pixels",),
    "whitened pixels": ("knn_whitened_pixels",),
    "chance": ("knn_chance",),
}


@dataclass(frozen=True)
class Contents:
    """A run with what is read from further files.

    about: run.json; baselines: name -> k-NN accuracy; raised: (step, kind, text) of the alarms in the log; lasting:
    those that hold at its end; frames: pictures by kind; measured: the report of `--measure`; evaluation: seconds of
    all reports; protocol: of the last k-NN; notes: one line on each file that cannot be read.
    """

    run: Run
    about: dict
    baselines: dict[str, float]
    raised: list[tuple[int, str, str]]
    lasting: list[Alarm]
    frames: dict[str, list[Frame]]
    measured: Report | None
    evaluation: float
    protocol: dict
    notes: list[str]

    @property
    def trained(self) -> list[dict]:
        """Records of logged steps."""
        return [record for record in self.run.records if "loss" in record]

    @property
    def images_seen(self) -> int | None:
        """Images read up to the last record, repetitions included."""
        return None if self.run.recipe is None else self.run.step * self.run.recipe.train.batch_size


def read_contents(folder) -> Contents:
    """Read a run folder, also one of a run in progress; UserError where it is none."""
    folder = Path(folder)
    if not is_run(folder):
        raise UserError(
            f"{folder} is not a run folder (it has no recipe.yaml with run.json or checkpoints); give the --out of a "
            "training run; `maskwise runs FOLDER` lists those below a folder"
        )
    run, about = read_run_folder(folder), read_run(folder)
    notes = damage(folder, about)
    baselines, measured = read_baselines(folder, notes), read_measured(folder, notes)
    evaluation, protocol = read_reports(folder, notes)
    lasting: list[Alarm] = []
    if run.recipe is not None and run.steps is not None:
        with contextlib.suppress(KeyError, TypeError):  # logs of other programs
            lasting = log_alarms(folder, run.recipe, run.records, about, run.steps)
    raised = [
        (record["step"], RENAMED_ALARMS.get(record["kind"], record["kind"]), record["alarm"])
        for record in run.records
        if isinstance(record.get("alarm"), str) and isinstance(record.get("kind"), str)
    ]
    frames = read_pictures(folder, notes)
    baselines = baselines or measured_baselines(measured)
    return Contents(run, about, baselines, raised, lasting, frames, measured, evaluation, protocol, notes)


def damage(folder: Path, about: dict) -> list[str]:
    """Return a line on each of recipe.yaml, run.json and metrics.jsonl that cannot be read, or only in part."""
    notes = []
    try:
        read_recipe(folder, try_model=False)
    except UserError as error:
        lines = "; ".join(line.strip() for line in str(error).split("\n"))
        notes.append(f"recipe.yaml cannot be read: {lines}")
    if not about:
        notes.append("run.json is missing or cannot be read")
    path = folder / "metrics.jsonl"
    try:
        records, length = read_records(path)
        rest = path.read_bytes()[length:] if path.exists() else b""
    except OSError as error:
        return [*notes, f"metrics.jsonl cannot be read: {error.strerror}"]
    if b"\n" in rest:  # a last line without its end is one that the run is writing
        lines = rest.count(b"\n")
        ending = "s are" if lines > 1 else " is"
        notes.append(f"metrics.jsonl cannot be read from line {len(records) + 1} on: {lines} line{ending} left out")
    return notes


def read_baselines(folder: Path, notes: list[str]) -> dict[str, float]:
    """Return the accuracies of reports/baselines.json with chance; {} where there is none."""
    path = folder / "reports" / f"{NAME}.json"
    if not path.exists():
        return {}
    try:
        report = Report.load(path)
        return {**rows(report), "chance": report.numbers["chance"]}
    except (UserError, KeyError, TypeError):
        notes.append(f"reports/{path.name} cannot be read")
        return {}


def read_measured(folder: Path, notes: list[str]) -> Report | None:
    """Return the report of `maskwise report --measure`, None where there is none."""
    path = folder / "reports" / f"{MEASURED}.json"
    if not path.exists():
        return None
    try:
        return Report.load(path)
    except UserError:
        notes.append(f"reports/{path.name} cannot be read")
        return None


def measured_baselines(report: Report | None) -> dict[str, float]:
    """Return the k-NN accuracies without training that `--measure` found; of two features the better one."""
    numbers = report.numbers if report else {}
    found = {name: [numbers[key] for key in keys if key in numbers] for name, keys in MEASURED_ROWS.items()}
    return {name: max(values) for name, values in found.items() if values}


def read_reports(folder: Path, notes: list[str]) -> tuple[float, dict]:
    """Return the seconds of all reports of a run, and the protocol of its last k-NN."""
    seconds, protocol = 0.0, {}
    for path in sorted((folder / "reports").glob("*.json")):
        try:
            report = Report.load(path)
            seconds += float(report.cost.get("seconds", 0))
        except (UserError, AttributeError, TypeError, ValueError):
            if path.stem not in (NAME, MEASURED):  # noted where they are read
                notes.append(f"reports/{path.name} cannot be read")
            continue
        if path.stem.startswith("knn_step_") and isinstance(report.protocol, dict):
            protocol = report.protocol
    return seconds, protocol

"""Files of a table: JSON, page and picture, and their copies in docs/results."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.reproduce.tables.chart import write_charts
from launch.reproduce.tables.measures import measure_file
from launch.reproduce.tables.pace import pace_file, read_pace
from launch.reproduce.tables.page import page
from launch.reproduce.tables.plan import Job, Setting
from launch.reproduce.tables.results import table
from launch.reproduce.tables.runs import plan_hash, record_file
from maskwise.bench import record
from maskwise.engine.atomic_file import write_atomic
from maskwise.errors import UserError

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"


def write_table(
    name: str,
    title: str,
    planned: Mapping[str, Sequence[Job]],
    settings: Mapping[str, Setting],
    options: argparse.Namespace,
) -> None:
    """Write table.json, .md and .png into the folder `out`; with --publish also docs/results/NAME_table_BUDGET.*."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seeds = sorted({seed for setting in settings.values() for seed in setting.seeds})
    about = {"story": name, "budget": options.budget, "scale": options.scale, "miniature": options.miniature}
    result = table(planned, settings, options.out, about)
    if not result["runs"]:
        return
    now = record.describe(device, seeds, command_of(name, options))
    for run in result["runs"].values():
        now = {**record.continued(run["record"], now), "date": max(now["date"], run["record"]["date"])}
    result = {"record": now, **result}
    file = options.out / "table.json"
    record.write(file, result)
    write_atomic(file.with_suffix(".md"), page(result, settings, title))
    write_charts(result, settings, file.with_suffix(".png"))
    print(f"{file.with_suffix('.md')}: {len(result['runs'])} of {sum(map(len, planned.values()))} runs", flush=True)
    if options.publish:
        for ending in (".json", ".md", ".png"):
            shutil.copyfile(file.with_suffix(ending), RESULTS / f"{name}_table_{options.budget}{ending}")


def restore(file: Path, planned: Mapping[str, Sequence[Job]], out: Path) -> int:
    """Write into `out` what an earlier table.json holds of these runs: records, paces, evaluations; returns how many.

    Runs that `out` has are left as they are. Raises UserError for a file that is no such table, and for a run of
    another plan.
    """
    try:
        known = record.read(file)["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {file}: not the JSON of a table ({error})") from error
    restored = 0
    for job in (job for jobs in planned.values() for job in jobs):
        if job.key not in known or record_file(job, out).is_file():
            continue
        run = dict(known[job.key])
        pace, evaluations = run.pop("pace"), run.pop("measures")
        if run["plan"] != plan_hash(job):
            raise UserError(f"--resume {file}: {job.key} is of another recipe than it has now: leave --resume out")
        parts = {measure_file(job, out, name): content for name, content in evaluations.items()}
        if pace is not None and read_pace(job, out) is None:
            parts[pace_file(job, out)] = pace
        parts[record_file(job, out)] = run  # last: it says that the run is complete
        for path, content in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(content, indent=1) + "\n")
        restored += 1
    return restored


def command_of(name: str, options: argparse.Namespace) -> str:
    """Return the command that makes this table, without what does not change it."""
    words = [f"bash launch/reproduce/{name}_table.sh --budget {options.budget}"]
    words += [f"--settings {' '.join(options.settings)}"] if options.settings else []
    words += [f"--rows {' '.join(options.rows)}"] if options.rows else []
    words += [f"--seeds {options.seeds}"] if options.seeds else []
    words += [f"--scale {options.scale:g}"] if options.scale != 1 else []
    words += ["--miniature"] if options.miniature else []
    return " ".join([*words, *options.overrides])

"""`maskwise runs`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from maskwise.cli.console import Parser, print_line
from maskwise.errors import UserError
from maskwise.process.streams import is_terminal

SHOWN_CHANGES = 4  # of a run, in the table


def runs_parser() -> Parser:
    """Options of `maskwise runs`."""
    parser = Parser(
        "maskwise runs",
        description="List every run below a folder: state, progress, loss, k-NN, alarms, speed, cost, and what its "
        "recipe changes. Two runs are compared: recipes, and curves in one picture.",
    )
    parser.add_argument(
        "folders", metavar="FOLDER", type=os.path.expanduser, nargs="+", help="a folder that holds runs; or two runs"
    )
    parser.add_argument(
        "--sort", metavar="KEY", help="a column, a baseline or a recipe key; --sort=-knn: the largest first"
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        action="append",
        default=[],
        help="only runs with state=failed, 'knn>30', masking.name!=none ...; may be repeated",
    )
    parser.add_argument("--csv", metavar="FILE", type=os.path.expanduser, help="write the table with all columns")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        type=os.path.expanduser,
        help="of two runs: the picture of their curves (default: comparison.png)",
    )
    return parser


def runs(words: list[str]) -> int:
    """List runs, or compare two."""
    given = runs_parser().parse_args(words)
    from maskwise.build import runs as running
    from maskwise.cli.embedding import check_outputs

    check_outputs(given.csv, given.picture)
    if len(given.folders) == 2 and all(running.is_run(Path(folder)) for folder in given.folders):
        return compare(given)
    if given.picture:
        raise UserError("--picture draws two runs; give two run folders")
    paths = list(dict.fromkeys(path for folder in given.folders for path in running.find_runs(folder)))
    found = running.filtered([running.read_run_folder(path) for path in paths], given.where)
    if given.sort:
        found = running.sorted_runs(found, given.sort)
    if given.csv:
        from maskwise.engine.atomic_file import write_atomic

        write_atomic(given.csv, running.as_csv(found))
    if given.json:
        print_line(json.dumps([run.row() for run in found], indent=1))
        return 0
    print_line(table(found))
    if given.csv:
        print_line(f"table: {given.csv}")
    return 0


def table(found: list) -> str:
    """Format runs as an aligned table."""
    from maskwise.cli.tables import Listing

    rows = []
    for run in found:
        changes = [f"{key}={values[1]}" for key, values in run.changes.items()]
        more = [f"and {len(changes) - SHOWN_CHANGES} more"] if len(changes) > SHOWN_CHANGES else []
        base = [
            f"{name.removeprefix('knn_').removesuffix('_pooled')} {value:.1f}" for name, value in run.baselines.items()
        ]
        rows.append(
            (
                run.path,
                f"{run.state} ({run.note})" if run.note and run.state != "preempted" else run.state,
                f"{run.step}/{run.steps or '?'}",
                "" if run.epochs is None else f"{run.epoch:g}/{run.epochs}",
                number(run.loss, 3),
                " ".join([number(run.knn, 1), *([f"({', '.join(base)})"] if base else [])]).strip(),
                ", ".join(run.alarms),
                number(run.img_s, 0 if (run.img_s or 0) >= 10 else 2),
                "" if run.hours is None else f"{run.hours:.2f} h",
                run.commit or "",
                " ".join([run.parent or "", *changes[:SHOWN_CHANGES], *more]).strip(),
            )
        )
    titles = ("run", "state", "step", "epoch", "loss", "k-NN", "alarms", "img/s", "cost", "commit", "recipe")
    states = [run.state for run in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    return Listing(titles, rows, f"{len(found)} runs: {counts}" if found else "no run meets the conditions").text(width)


def number(value: float | None, digits: int) -> str:
    """Return a number with some digits, nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def compare(given) -> int:
    """Print what two runs differ in, and draw their curves."""
    from maskwise.build import runs as running
    from maskwise.cli.tables import Listing
    from maskwise.engine.atomic_file import atomic_path, write_error
    from maskwise.imaging.drawing import write_png

    for option, value in (("--sort", given.sort), ("--where", given.where), ("--csv", given.csv)):
        if value:
            raise UserError(f"{option} is for a list of runs, and two runs are compared; leave it out")
    first, second = (running.read_run_folder(Path(folder)) for folder in given.folders)
    changes, picture = running.differences(first, second), running.comparison(first, second)
    file = given.picture or "comparison.png"
    try:
        with atomic_path(file) as temporary:
            write_png(temporary, picture)
    except OSError as error:
        raise UserError(write_error(file, error)) from None
    if given.json:
        text = {"runs": [first.row(), second.row()], "differences": {key: list(pair) for key, pair in changes.items()}}
        print_line(json.dumps({**text, "picture": file}, indent=1))
        return 0
    print_line(table([first, second]))
    rows = [(key, before, after) for key, (before, after) in changes.items()]
    note = f"{len(rows)} values of the recipes differ" if rows else "the recipes are equal"
    print_line(Listing(("key", first.path, second.path), rows, note).text())
    print_line(f"curves: {file}")
    return 0

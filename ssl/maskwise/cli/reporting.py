"""`maskwise report`."""

from __future__ import annotations

import json
import os

from maskwise.cli.console import Parser, print_line


def report_parser() -> Parser:
    """Options of `maskwise report`."""
    parser = Parser(
        "maskwise report",
        description="Write one HTML page of a run, also of one in progress: curves, k-NN with its baselines, attention "
        "and masks, alarms, cost, recipe. Several runs are compared on one page. It opens without a server.",
    )
    parser.add_argument("runs", metavar="RUN", type=os.path.expanduser, nargs="+", help="a run folder")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=os.path.expanduser,
        help="the page (default: RUN/report.html; of several runs comparison.html)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure a finished run first, and print it: k-NN of its last checkpoint, of the untrained network and of "
        "pixels, and which masked patches lie on objects",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def report(words: list[str]) -> int:
    """Write the page of runs; with --measure, after an evaluation of each."""
    given = report_parser().parse_intermixed_args(words)
    from maskwise.cli.embedding import check_outputs
    from maskwise.process.progress import showing
    from maskwise.report.contents import read_contents
    from maskwise.report.page import write_page

    check_outputs(given.out)
    if given.measure:
        from maskwise import api

        for run in given.runs:
            read_contents(run)
        for run in given.runs:
            with showing("report"):
                text = api.report(run)
            if not given.json and text:
                print_line(str(text))
    path, runs = write_page(given.runs, given.out)
    if given.json:
        print_line(
            json.dumps({"page": str(path), "runs": [{**run.run.row(), "notes": run.notes} for run in runs]}, indent=1)
        )
        return 0
    for run in runs:
        for note in run.notes:
            print_line(f"{run.run.path}: {note}")
    print_line(f"page: {path}")
    return 0

"""`maskwise replay`."""

from __future__ import annotations

import json
import os

from maskwise.cli.console import Parser, check_folder_of, print_line
from maskwise.errors import UserError

LAST = -1


def replay_parser() -> Parser:
    """Options of `maskwise replay`."""
    parser = Parser(
        "maskwise replay",
        description="Rebuild the batch of a step from its keys, draw it, and compute the loss of each sample.",
    )
    parser.add_argument("run", metavar="RUN", type=os.path.expanduser, help="a run folder")
    parser.add_argument("step", metavar="STEP", type=int, nargs="?", help="a step from 1, numbered as in metrics.jsonl")
    parser.add_argument(
        "--bad",
        metavar="N",
        type=int,
        nargs="?",
        const=LAST,
        help="in place of STEP: the N-th skipped step of bad_batches.jsonl, without N the last",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="train in memory from the nearest checkpoint before the step, so that the weights are those of the step",
    )
    parser.add_argument(
        "--rows", metavar="N", type=int, default=8, help="samples that are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", type=os.path.expanduser, help="the picture (default: replay_step_STEP.png)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, with all samples")
    return parser


def replay(words: list[str]) -> int:
    """Replay a step of a run."""
    given = replay_parser().parse_args(words)
    if (given.step is None) == (given.bad is None):
        raise UserError("replay: give a STEP or --bad, one of them")
    if given.rows < 1:
        raise UserError(f"replay: --rows is {given.rows}; give 1 or more")
    check_folder_of("--picture", given.picture)
    from maskwise.doctor.replay import RunSteps
    from maskwise.doctor.replay_sheet import as_json, picture, text
    from maskwise.engine.atomic_file import atomic_path, write_error
    from maskwise.imaging.drawing import write_png

    found = RunSteps(given.run, given.step, bad=given.bad).replay(exact=given.exact)
    file = given.picture or f"replay_step_{found.step:08d}.png"
    try:
        with atomic_path(file) as temporary:
            write_png(temporary, picture(found, given.rows))
    except OSError as error:
        raise UserError(write_error(file, error)) from None
    if given.json:
        print_line(json.dumps({"run": given.run, **as_json(found), "picture": file}, indent=1))
        return 0
    print_line(f"{text(found, given.rows)}\npicture: {file}")
    return 0

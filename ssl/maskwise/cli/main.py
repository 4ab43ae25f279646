"""The command line: the table of verbs, and exit statuses. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys

from maskwise import __version__
from maskwise.cli import embedding, evaluating, exporting, inspecting, replaying, reporting, running, training
from maskwise.cli.console import print_error, print_line
from maskwise.cli.verb import Verb
from maskwise.engine.atomic_file import REMEDIES
from maskwise.engine.signals import Stopped, stop_at_once
from maskwise.errors import UserError
from maskwise.process.ending import end_process
from maskwise.process.streams import safe_streams

ABOUT = "Self-supervised vision pretraining that chooses what to hide."
MISTAKE = 2  # exit status after an error that the user can fix
STOPPED = 128  # plus the signal's number: exit status after Ctrl-C, SIGTERM or SIGHUP, as shells expect
READER_GONE = {errno.EPIPE, errno.EIO}  # of standard output: `maskwise list recipes | head`, a closed terminal
PATH_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
}

VERBS: dict[str, Verb] = {
    "train": Verb(
        "pretrain from a recipe, or from --data FOLDER alone; the same command continues an interrupted run",
        training.train_parser,
        training.train,
    ),
    "doctor": Verb(
        "measure memory and img/s of a recipe on this machine, or diagnose a RUN",
        training.doctor_parser,
        training.doctor,
    ),
    "evaluate": Verb(
        "evaluate a model: `maskwise evaluate knn MODEL train=DIR test=DIR`",
        evaluating.evaluate_parser,
        evaluating.evaluate,
    ),
    "embed": Verb(
        "write the vectors of all images of a folder to a Parquet, CSV or NPY file",
        embedding.embed_parser,
        embedding.embed,
    ),
    "search": Verb(
        "print the images of an embedding file that are nearest to given images",
        embedding.search_parser,
        embedding.search,
    ),
    "dupes": Verb(
        "find near-duplicates in a set of images, and test images that leak into it",
        embedding.dupes_parser,
        embedding.dupes,
    ),
    "baselines": Verb(
        "k-NN without training: of an untrained network, raw and whitened pixels, for any FOLDER or RECIPE",
        evaluating.baselines_parser,
        evaluating.baselines,
    ),
    "look": Verb(
        "draw what a model sees in images: attention, masks, boxes, as a sheet or an interactive page",
        evaluating.look_parser,
        evaluating.look,
    ),
    "show": Verb("print a recipe with all defaults and their origins", inspecting.show_parser, inspecting.show),
    "list": Verb(
        "print the poolings, maskings, methods, backbones, datasets, evaluations, recipes or keys",
        inspecting.list_parser,
        inspecting.list_table,
    ),
    "export": Verb(
        "write a run's encoder for timm, transformers and `maskwise.load`, or push it to the Hub",
        exporting.export_parser,
        exporting.export,
    ),
    "convert": Verb(
        "convert weights of DINO, iBOT, AttMask, SimPool, MAP, timm, DINOv2 or DINOv3 to a maskwise folder, and back",
        exporting.convert_parser,
        exporting.convert,
    ),
    "report": Verb(
        "write one HTML page of a RUN, or of several compared: curves, k-NN, pictures, alarms, cost, recipe",
        reporting.report_parser,
        reporting.report,
    ),
    "replay": Verb(
        "rebuild the batch of any step of a run, draw it, and print the loss of each sample",
        replaying.replay_parser,
        replaying.replay,
    ),
    "runs": Verb("list the runs below a folder, or compare two", running.runs_parser, running.runs),
    "bench": Verb(
        "measure the data path, a step, training or k-NN, against named baselines",
        inspecting.bench_parser,
        inspecting.bench,
    ),
}


def usage() -> str:
    """The text of `maskwise --help`."""
    verbs = "\n".join(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items())
    more = (
        "`maskwise VERB --help` prints its options; several processes: "
        "`torchrun --nproc-per-node=2 -m maskwise train ...`"
    )
    return f"usage: maskwise VERB ...\n\n{ABOUT}\n\n{verbs}\n\n{more}"


def main(words: list[str] | None = None) -> int:
    """Run one verb and return the exit status.

    0: done; 1: `doctor` found problems in a run; 2: an error that the user can fix; 130: stopped by Ctrl-C, 143 by
    SIGTERM, 129 by SIGHUP. A stream that cannot be written ends nothing, but a result that standard output refuses
    (a full disk) is an error. Without `words`, as a console script, a rank of several ends the process here.
    """
    status = run_guarded(list(sys.argv[1:] if words is None else words))
    if words is None and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        end_process(status)
    return status


def run_guarded(words: list[str]) -> int:
    """Run one verb with streams and signals that cannot end it with a trace; returns the exit status."""
    with safe_streams() as output, stop_at_once():
        status = run_reporting_errors(words)
        output.flush()
        number = getattr(output.error, "errno", None)
        if number and number not in READER_GONE and not status and words[:1] != ["train"]:
            print_error(f"cannot write to standard output ({output.error.strerror}): {remedy(number)}")
            return MISTAKE
    return status


def run_reporting_errors(words: list[str]) -> int:
    """Run one verb; an error that the user can fix becomes one line and an exit status."""
    try:
        return run(words)
    except UserError as error:
        print_error(str(error))
        return MISTAKE
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if words[:1] == ["train"]:
            after = "; saved checkpoints remain, and the same command continues from the last one"
        else:
            after = " before the end; give the command again"
        print_error(f"stopped by {name}{after}")
        return STOPPED + number
    except OSError as error:
        if error.filename is None or error.errno not in PATH_ERRORS:
            raise
        print_error(f"{error.filename}: {error.strerror}; {remedy(error.errno)}")
        return MISTAKE


def remedy(number: int) -> str:
    """Return what to do about a path error."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return REMEDIES[number]
    return "give a path that can be read and written"


def run(words: list[str]) -> int:
    """Run the verb that the first word names."""
    if not words or words[0] in ("-h", "--help", "help"):
        print_line(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print_line(f"maskwise {__version__}")
        return 0
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise UserError(f"no verb `{name}`{hint}; verbs are {', '.join(VERBS)}")
    return VERBS[name].run(rest)

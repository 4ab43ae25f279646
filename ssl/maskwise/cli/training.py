"""`maskwise train` and `maskwise doctor`."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from maskwise.cli.console import Parser, print_line
from maskwise.errors import UserError

UNHEALTHY = 1  # exit status where `maskwise doctor RUN` found a problem


def train_parser() -> Parser:
    """Options of `maskwise train`."""
    parser = Parser(
        "maskwise train",
        description="Pretrain from a recipe, or from --data alone. The same command continues the run it finds in DIR. "
        "With --epochs a run that is complete or was stopped is extended in another folder.",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="a recipe file, or a shipped one such as debug/tiny; without it one is chosen for --data and written",
    )
    parser.add_argument(
        "--data", metavar="FOLDER", type=os.path.expanduser, help="the images: a folder, or a list file"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=os.path.expanduser,
        help="the run folder (default with --data alone: runs/ and its name)",
    )
    parser.add_argument(
        "--masked",
        action="store_true",
        help="with --data alone: choose a Vision Transformer trained by iBOT with AttMask, also where a ResNet learns "
        "faster",
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="continue a run whose images have changed, with its own length of an epoch",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=int,
        help="with a run folder as RECIPE: extend this run to N epochs in DIR, from its last checkpoint; its own "
        "folder stays as it is",
    )
    parser.add_argument("--steps", metavar="N", type=int, help="the same for a run that is counted in steps")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    return parser


def train(words: list[str]) -> int:
    """Train, or continue the run in --out."""
    given = train_arguments(words)
    from maskwise.engine.signals import StopSignals

    with StopSignals(ctrl_c=False):  # SIGTERM may arrive while torch is still being imported
        if given.epochs is not None or given.steps is not None:
            return finished(extended(given), given.out)
        from maskwise.recipe.reading import read_recipe

        chosen = given.recipe is None
        if chosen:
            given.recipe, given.out = suggested_recipe(given.data, given.out, masked=given.masked)
        recipe = read_recipe(given.recipe, *given.overrides)
        if chosen and not Path(given.out, "recipe.yaml").exists():
            print_cost(recipe)
        from maskwise import build

        status = build.train(recipe, out=given.out, accept_changed_data=given.accept_changed_data)
    return finished(status, given.out)


def extended(given: argparse.Namespace) -> dict:
    """Extend the run that RECIPE names; returns the status of the run."""
    from maskwise import build

    options = {"epochs": given.epochs, "steps": given.steps, "accept_changed_data": given.accept_changed_data}
    return build.extend(given.recipe, given.out, *given.overrides, **options)


def finished(status: dict, out: str) -> int:
    """Print that a run is complete; returns the exit status."""
    if status["status"] == "complete":  # otherwise the run log has printed why it ended
        print_line(f"complete: {status['step']} steps in {out}")
    return 0


def train_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the words of `maskwise train`; raises UserError where recipe, data or run folder is missing."""
    given = train_parser().parse_intermixed_args(words)
    if given.recipe and "=" in given.recipe and not os.path.exists(given.recipe):  # an override in the recipe's place
        given.recipe, given.overrides = None, [given.recipe, *given.overrides]
    if given.recipe is None and given.data is None:
        raise UserError("train: give a RECIPE, or --data FOLDER to have one chosen; see `maskwise train --help`")
    lengths = [f"--{name}" for name in ("epochs", "steps") if getattr(given, name) is not None]
    if lengths and (given.recipe is None or not os.path.isdir(given.recipe)):
        raise UserError(
            f"train: {lengths[0]} extends a run, whose folder is given in the place of RECIPE; the length of a new run "
            f"is train.{lengths[0][2:]}=N"
        )
    if given.recipe is not None and given.masked:
        raise UserError("train: --masked chooses a recipe for --data; leave it out with RECIPE")
    if given.recipe is not None and given.out is None:
        raise UserError("train: give --out DIR, the folder of the run")
    if given.data is not None and given.recipe is not None:
        kind = "list" if os.path.isfile(given.data) else "folder"
        given.overrides = [f"data.name={kind}", f"data.path={given.data}", *given.overrides]
    return given


def suggested_recipe(data: str, out: str | None, *, masked: bool = False) -> tuple[str, str]:
    """Write the recipe chosen for a folder next to the run folder, unless it exists -> (recipe file, run folder)."""
    folder = Path(out or Path("runs") / (Path(data).resolve().stem or "images"))
    file = folder.parent / f"{folder.name}.yaml"
    if file.exists():
        check_chosen_for(file, folder, data, masked=masked)
        print_line(f"recipe: {file}, from an earlier start; remove it to have a new one chosen")
        return str(file), str(folder)
    from maskwise.doctor import suggest_recipe

    suggestion = suggest_recipe.suggest(data, training_device(), masked=masked)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")  # every rank writes the same text
    temporary.write_text(suggestion.text, encoding="utf-8")
    os.replace(temporary, file)
    edit = f"recipe: {file} (edit it and start again with `maskwise train {file} --out DIR`)"
    print_line("\n".join([*suggestion.reasons, edit]))
    return str(file), str(folder)


def training_device():
    """Return the torch device on which a run of one process trains."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_cost(recipe) -> None:
    """Print the expected time of a chosen recipe, from a few of its steps."""
    from maskwise.doctor import suggest_recipe

    print_line(f"cost: {suggest_recipe.cost(recipe, training_device())}")


def check_chosen_for(file: Path, folder: Path, data: str, *, masked: bool = False) -> None:
    """Raise UserError for a recipe that an earlier start chose for other images, or without `masked`."""
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe(file, try_model=False)
    if masked and recipe.masking.name == "none":
        raise UserError(f"{file} was chosen without --masked: give another --out, or remove it")
    before = str(recipe.values.get("data.path"))
    if os.path.realpath(os.path.expanduser(before)) != os.path.realpath(data):
        moved = shlex.join(["maskwise", "train", str(file), "--out", str(folder), f"data.path={data}"])
        raise UserError(
            f"{file} was chosen for {before}: give another --out for {data}; or, if these are the same images in "
            f"another place, `{moved}`"
        )


def doctor_parser() -> Parser:
    """Options of `maskwise doctor`."""
    parser = Parser(
        "maskwise doctor",
        description="Measure a few real steps of a recipe on this machine and advise on its batch size and data; "
        "or read a run folder: exit status 0 if the run is healthy, 1 with the problems found. Nothing is written.",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE|RUN",
        type=os.path.expanduser,
        nargs="?",
        help="a recipe file, a shipped recipe or a run folder; without it only the machine is described. "
        "RUN/recipe.yaml measures a run's recipe",
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="about how long to measure (default: %(default)s)"
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    return parser


def doctor(words: list[str]) -> int:
    """Measure a recipe, or diagnose a run folder."""
    given = doctor_parser().parse_intermixed_args(words)
    if given.seconds <= 0:
        raise UserError(f"doctor: --seconds is {given.seconds:g}; give more than 0")
    if given.recipe is not None and os.path.isdir(given.recipe):
        from maskwise.doctor.diagnose import diagnose

        diagnosis = diagnose(given.recipe, *given.overrides)
        print_line(diagnosis.text())
        return UNHEALTHY if diagnosis.findings else 0
    from maskwise.doctor.report import report_text
    from maskwise.recipe.reading import read_recipe

    recipe = None if given.recipe is None else read_recipe(given.recipe, *given.overrides)
    print_line(report_text(recipe, given.seconds))
    return 0

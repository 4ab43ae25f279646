"""Extending a run: it goes on for more epochs in another folder, and its own folder stays as it is."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from maskwise.build.running.continuing import (
    PLACES,
    EarlierRun,
    differing,
    images_message,
    is_free,
    last_images,
    run_in_data,
    training_images,
)
from maskwise.build.running.run_folder import read_run
from maskwise.build.training import schedules_of
from maskwise.data.loader import steps_per_epoch
from maskwise.engine.atomic_file import write_atomic, write_error
from maskwise.engine.checkpoint import WRITING, Damaged, directories, verify
from maskwise.engine.run_log import BAD_BATCHES, BAD_IMAGES
from maskwise.engine.trainer import Schedules
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe

LENGTH = ("train.epochs", "train.steps")
# what may differ from the run that is extended, besides what any start may change
ENDS = ("optimizer.min_lr", "optimizer.weight_decay_end", "teacher.momentum_end")
SCHEDULE = (*LENGTH, "optimizer.schedule", "optimizer.decay_share", *ENDS)
RATES = {"lr": "learning rate", "weight_decay": "weight decay", "momentum": "momentum"}
LOGS = ("metrics.jsonl", BAD_BATCHES, BAD_IMAGES)  # cut at the step when the log is opened


@dataclass(frozen=True)
class Extension:
    """A run, its run.json and recipe, and the recipe that extends it; checkpoints: those to try, the best first."""

    run: Path
    record: dict
    before: Recipe
    recipe: Recipe
    per_epoch: int
    checkpoints: tuple[Path, ...]

    def earlier(self, folder: Path, data, *, accept_changed_data: bool = False) -> EarlierRun:
        """Return what the extended run begins from; raises UserError for other images, unless they are accepted."""
        images, notes = training_images(self.recipe, data), run_in_data(folder, self.recipe, data)
        known = last_images(self.record)
        differences = differing(known, images)
        if differences and not accept_changed_data:
            raise UserError(images_message(self.run, self.before, self.recipe, known, images, differences))
        if "classes" in differences:
            raise UserError(f"{self.run} was trained on other classes than these: it cannot be extended")
        return EarlierRun(self.record, images, bool(differences), notes=notes)

    def copy_into(self, folder: Path) -> tuple[dict, list[str]]:
        """Copy the checkpoint and the logs up to it; returns the inherited entries of run.json, and lines to print.

        Raises UserError where no checkpoint is sound, or the disk refuses.
        """
        try:
            step, lines = self.copy_checkpoint(folder / "checkpoints")
            for name in LOGS:
                if (self.run / name).is_file():
                    shutil.copyfile(self.run / name, folder / name)
            for kind in ("reports", "pictures"):
                for file in (self.run / kind).glob("[!.]*_step_*"):
                    if step_of(file) <= step:
                        copy_file(file, folder / kind)
            if (self.run / "reports" / "baselines.json").is_file():
                copy_file(self.run / "reports" / "baselines.json", folder / "reports")
            for file in (self.run / "tensorboard").glob("events.*"):
                copy_file(file, folder / "tensorboard")
        except OSError as error:
            raise UserError(write_error(error.filename or folder, error)) from None
        kept = {key: self.record[key] for key in ("images", "decoder", "start") if key in self.record}
        about = {"run": str(self.run), "started": self.record.get("started"), "step": step}
        return {**kept, "data": last_images(self.record), "extends": about}, [*lines, self.line(step)]

    def copy_checkpoint(self, folder: Path) -> tuple[int, list[str]]:
        """Copy the first sound checkpoint to a folder `checkpoints`; returns its step, and lines on damaged ones."""
        faults: list[str] = []
        for source in self.checkpoints:
            aside = folder / f"{WRITING}{source.name}"
            shutil.rmtree(aside, ignore_errors=True)
            try:
                shutil.copytree(source, aside)
                step = int(verify(aside)["step"])
            except Damaged as fault:
                shutil.rmtree(aside, ignore_errors=True)
                faults.append(f"checkpoint damaged ({source}: {fault})")
                continue
            shutil.rmtree(folder / source.name, ignore_errors=True)  # of a start that was killed
            os.rename(aside, folder / source.name)
            write_atomic(folder / "last", source.name + "\n")
            return step, faults
        raise UserError(f"no checkpoint of {self.run} is sound ({'; '.join(faults)}): it cannot be extended")

    def line(self, step: int) -> str:
        """Describe the beginning: the step, the length, and what the longer schedule changes there."""
        before, after = (schedules_of(one, self.per_epoch, length(one, self.per_epoch)) for one in self.both)
        text = f"extends {self.run} from step {step} ({described(self.before)} -> {described(self.recipe)}): "
        if first_difference(before, after, step) == step:
            reached = step_of(self.newest)
            again = f"; the steps {step + 1} to {reached}, with its decay, are trained again" if step < reached else ""
            return f"{text}up to this step the schedules are those of the longer run{again}"
        values = {name: (getattr(before, name)(step), getattr(after, name)(step)) for name in RATES}
        jumps = [f"{RATES[name]} {old:.4g} -> {new:.4g}" for name, (old, new) in values.items() if old != new]
        return f"{text}jumps to the schedule of the longer run, {', '.join(jumps) or 'equal at this step'}"

    @property
    def both(self) -> tuple[Recipe, Recipe]:
        """Recipes of the run and of its extension."""
        return self.before, self.recipe

    @property
    def newest(self) -> Path:
        """Last checkpoint of the run."""
        return max(self.checkpoints, key=step_of)


def extension(run, out, *overrides: str, epochs: int | None = None, steps: int | None = None) -> Extension:
    """Return the extension of a run to so many epochs, or steps where it is counted in steps; nothing is written.

    overrides: schedule, places and other values that may change.
    Raises UserError for a run without checkpoint, a length that it has reached, other changes of its recipe, and for an
    `out` that holds something else than this extension.
    """
    run, folder = Path(run).expanduser(), Path(out).expanduser()
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder (it has no recipe.yaml); give the --out of a training run")
    checkpoints = directories(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint yet: there is nothing to extend; start it again by its own command")
    check_out(run, folder)
    before, record = read_recipe(run), read_run(run)
    recipe = read_recipe(run, *lengths(run, before, epochs, steps), *overrides)
    changed = before.changes(recipe)
    refused = [key for key in changed if key not in (*SCHEDULE, *PLACES) and not is_free(key)]
    if refused:
        values = ", ".join(f"{key}={changed[key][0]}, not {changed[key][1]}" for key in refused)
        raise UserError(
            f"{run} was trained with {values}: an extension changes the length and the schedule ({', '.join(SCHEDULE)})"
        )
    per_epoch = max(1, steps_per_epoch(int(record.get("images", before.train.batch_size)), before.train.batch_size))
    reached = step_of(checkpoints[0])
    if length(recipe, per_epoch) <= reached:
        count = f"{reached / per_epoch:.4g}" if recipe.train.steps is None else f"{reached}"
        unit = "epochs" if recipe.train.steps is None else "steps"
        raise UserError(f"{run} has reached {count} {unit}: give more, --{unit} {describe_more(recipe)}")
    return Extension(run, record, before, recipe, per_epoch, best_first(checkpoints, before, recipe, per_epoch))


def lengths(run: Path, before: Recipe, epochs: int | None, steps: int | None) -> list[str]:
    """Return the length as an override; raises UserError for a unit in which the run is not counted."""
    if (epochs is None) == (steps is None):
        raise UserError("give --epochs or --steps, one of them")
    if before.train.steps is None and epochs is None:
        raise UserError(f"{run} is counted in epochs ({before.train.epochs}): give --epochs in place of --steps")
    if before.train.steps is not None and steps is None:
        raise UserError(f"{run} is counted in steps ({before.train.steps}): give --steps in place of --epochs")
    return [f"train.epochs={epochs}" if steps is None else f"train.steps={steps}"]


def check_out(run: Path, folder: Path) -> None:
    """Raise UserError for a folder that is the run's, lies in it, or holds something else than its extension."""
    source, place = os.path.realpath(run), os.path.realpath(folder)
    if place == source or place.startswith(source + os.sep):
        raise UserError(f"--out {folder} lies in {run}, which stays as it is: give another folder")
    if (folder / "recipe.yaml").is_file():
        known = read_run(folder).get("extends") or {}
        if "started" not in known or known["started"] != read_run(run).get("started"):
            raise UserError(f"--out {folder} holds a run that is no extension of {run}: give another folder")


def best_first(checkpoints: list[Path], before: Recipe, after: Recipe, per_epoch: int) -> tuple[Path, ...]:
    """Sort the checkpoints of a run: the newest first; those from before a decay first where the run has one.

    A step up to which both schedules are equal needs no jump, and nothing that a decay has done is lost twice.
    """
    old, new = (schedules_of(recipe, per_epoch, length(recipe, per_epoch)) for recipe in (before, after))
    equal = first_difference(old, new, step_of(checkpoints[0]))
    agrees = [path for path in checkpoints if 0 < step_of(path) <= equal]
    if before.optimizer.schedule == "cosine" or not agrees:
        return tuple(checkpoints)
    return (*agrees, *(path for path in checkpoints if path not in agrees))


def first_difference(old: Schedules, new: Schedules, limit: int) -> int:
    """Return the first step below `limit` at which two schedules differ, `limit` where there is none."""
    pairs = [(getattr(old, name), getattr(new, name)) for name in RATES]
    return next((step for step in range(limit) if any(one(step) != two(step) for one, two in pairs)), limit)


def length(recipe: Recipe, per_epoch: int) -> int:
    """Return the steps of a run."""
    return recipe.train.steps or recipe.train.epochs * per_epoch


def described(recipe: Recipe) -> str:
    """Return schedule and length of a recipe in words."""
    size = f"{recipe.train.epochs} epochs" if recipe.train.steps is None else f"{recipe.train.steps} steps"
    return f"{recipe.optimizer.schedule}, {size}"


def describe_more(recipe: Recipe) -> str:
    """Return an example of a longer run."""
    return str(2 * (recipe.train.epochs if recipe.train.steps is None else recipe.train.steps))


def step_of(path: Path) -> int:
    """Return the step at the end of a file's or folder's name."""
    digits = path.stem.rpartition("step_")[2]
    return int(digits) if digits.isdigit() else 0


def copy_file(file: Path, folder: Path) -> None:
    """Copy a file into a folder, which is made."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(file, folder / file.name)

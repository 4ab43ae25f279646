"""Continuing a run from its mirror in storage (train.mirror)."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from maskwise.build.running.continuing import earlier_run
from maskwise.build.running.run_folder import read_run
from maskwise.distributed.environment import world_size
from maskwise.distributed.world import World
from maskwise.engine.checkpoint import Damaged, directories, step_of, verify
from maskwise.engine.mirror import CHECKPOINTS, KEY, LAST, Mirror, complete_steps, contents_of
from maskwise.engine.run_log import RunLog
from maskwise.errors import UserError
from maskwise.process.streams import print_notice
from maskwise.recipe.consistency import fitted
from maskwise.recipe.recipe import Recipe
from maskwise.storage.address import check, is_remote, local
from maskwise.storage.store import Patience, Store, filesystem

IDENTITY = ("started", "recipe_hash", "data")  # of run.json: they stay the same from start to start
RECORDS = ("recipe.yaml", "run.json")


def address_of(recipe: Recipe) -> str:
    """Return train.mirror, a local path as file:// address."""
    text = str(recipe.train.mirror).rstrip("/")
    return text if is_remote(text) else f"file://{os.path.abspath(os.path.expanduser(local(text)))}"


def check_mirror(recipe: Recipe) -> None:
    """Raise UserError for an address that cannot be used; nothing is asked of the storage."""
    address = address_of(recipe)
    if is_remote(address):
        check(address, KEY)
        if address.lower().startswith("http"):
            raise UserError(f"{KEY}: {address} cannot be written over HTTP; give s3://, gs:// or a local path")
    filesystem(address, KEY)


def store_of(recipe: Recipe) -> Store:
    """Return the store of the mirror."""
    return Store(KEY, Patience(recipe.speed.remote_timeout))


def mirror(recipe: Recipe, folder: Path, run_log: RunLog, keep_also: int = 0) -> AbstractContextManager[Mirror | None]:
    """Return the mirror of a run folder; a context of None without train.mirror and on other ranks than the main.

    keep_also: as for `Checkpoints`.
    """
    if recipe.train.mirror is None or not run_log.main:
        return nullcontext()
    return Mirror(
        folder, address_of(recipe), store_of(recipe), recipe.train.keep, run_log.print_line, keep_also=keep_also
    )


def restore(recipe: Recipe, folder: Path, data, world: World) -> None:
    """Fetch the run in the mirror into a folder that has none, or an earlier state of it; rank 0 does this.

    Raises the same UserError on all ranks where storage refuses, or holds a run of another recipe or on other images.
    """
    problem = ""
    if world.is_main:
        try:
            fetch(recipe, folder, data)
        except UserError as error:
            problem = str(error)
    world.raise_together(problem)


def fetch(recipe: Recipe, folder: Path, data) -> None:
    """Fetch the run in the mirror, checked, beside the run folder; then move it into place."""
    address, store = address_of(recipe), store_of(recipe)
    present = contents_of(store, address)
    if not all(name in present for name in RECORDS):
        return
    aside = folder.parent / f".{folder.name}.mirror"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name in RECORDS:
            download(store, address, name, aside)
        steps = complete_steps(present)
        if (folder / "recipe.yaml").is_file():
            if not steps:
                return
            if not same_run(folder, aside):
                raise UserError(
                    f"{KEY}: {address} holds another run than {folder}: give another mirror, or remove that one"
                )
            own = directories(folder / CHECKPOINTS)
            if own and (step_of(own[0]) or 0) >= (step_of(Path(steps[0])) or 0):
                return
        else:
            images = read_run(aside).get("images", len(data))
            try:
                earlier_run(aside, fitted(recipe, images, world_size()), data, accept_changed_data=True)
            except UserError as error:
                text = str(error).replace(str(aside), address).replace("another --out", "another train.mirror")
                longer = " To train longer, fetch it with its own epochs first, then extend it"
                raise UserError(re.sub(r" To train longer.*", longer, text)) from None
        step = sound(store, address, steps, present, aside)
        if step is None:
            return
        for name in present:
            if not name.startswith(f"{CHECKPOINTS}/") and name not in RECORDS:
                download(store, address, name, aside)
        (aside / CHECKPOINTS / LAST).write_text(step + "\n", encoding="utf-8")
        move(aside, folder)
        print_notice(f"mirror: {step} of {address} is now in {folder}")
    except OSError as error:
        raise UserError(f"cannot write beside {folder} ({error.strerror}): choose another with --out") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sound(store: Store, address: str, steps: list[str], present: list[str], aside: Path) -> str | None:
    """Fetch the newest checkpoint whose checksums are right; None where there is none at all.

    Raises UserError where there are some and all are damaged.
    """
    faults = []
    for step in steps:
        for name in present:
            if name.startswith(f"{CHECKPOINTS}/{step}/"):
                download(store, address, name, aside)
        try:
            verify(aside / CHECKPOINTS / step)
        except Damaged as fault:
            faults.append(f"{step}: {fault}")
            shutil.rmtree(aside / CHECKPOINTS / step)
            continue
        if faults:
            print_notice(f"mirror: checkpoint damaged ({'; '.join(faults)}): using {step} instead")
        return step
    if faults:
        raise UserError(f"{KEY}: no checkpoint in {address} is sound ({'; '.join(faults)}); give another mirror")
    return None


def download(store: Store, address: str, name: str, folder: Path) -> None:
    """Fetch one file of the mirror into a folder."""
    if ".." in name.split("/"):
        raise UserError(f"{KEY}: {address} holds a file named {name}; remove it")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    store.download(f"{address}/{name}", folder / name)


def same_run(folder: Path, other: Path) -> bool:
    """Return whether two folders hold the same run, maybe in different states."""
    here, there = read_run(folder), read_run(other)
    return all(here.get(key) == there.get(key) for key in IDENTITY)


def move(aside: Path, folder: Path) -> None:
    """Move the files of a run into a folder; recipe.yaml comes last, since it makes a run of the folder."""
    files = [path for path in aside.rglob("*") if path.is_file()]
    for path in sorted(
        files, key=lambda path: (path.name == "recipe.yaml", path.name == LAST, path.name == "meta.json")
    ):
        place = folder / path.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)

"""`RunCheckpoint`: the checkpoint that a model is read from, found by the rule of a run that continues."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from maskwise.engine.checkpoint import ENCODER, META, MODEL, Damaged, directories, first_sound, verify
from maskwise.errors import UserError
from maskwise.process import streams

CHECKPOINTS = "checkpoints"
NETWORKS = ("teacher.encoder.", "student.encoder.")  # how keys of a checkpoint's model begin
_printed: set[str] = set()  # one command reads encoder, head and classifier: each line is printed once


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint with verified checksums: its directory, and the run folder that it belongs to."""

    run: Path
    directory: Path

    @property
    def model(self) -> Path:
        """The file with all networks, heads and centers."""
        return self.directory / MODEL

    @property
    def encoder(self) -> Path:
        """The description of the encoder."""
        return self.directory / ENCODER

    @property
    def meta(self) -> Path:
        """The description of the checkpoint: step, recipe, classes of a supervised run."""
        return self.directory / META

    @property
    def step(self) -> int:
        """Steps of training behind it."""
        digits = self.directory.name.rpartition("_")[2]
        return int(digits) if digits.isdigit() else 0


def find(path) -> RunCheckpoint | None:
    """Find the checkpoint at a path: a run folder, its `checkpoints`, one checkpoint, or the model file in one.

    In a run folder it is the last or, if that is damaged, missing or removed, the newest sound one, with one line on
    standard error. None for anything else, and for a run without a checkpoint. Raises UserError for a damaged one.
    """
    path = Path(path)
    if is_model_file(path):
        path = path.parent
    if is_checkpoint(path):
        try:
            verified(path)
        except Damaged as fault:
            raise UserError(
                f"{path} is damaged ({fault}): give the run folder, whose newest sound checkpoint is used, or restore "
                "it from a copy"
            ) from None
        return RunCheckpoint(path.parents[1] if path.parent.name == CHECKPOINTS else path, path)
    run = path.parent if path.name == CHECKPOINTS else path
    if not directories(run / CHECKPOINTS):
        return None
    return RunCheckpoint(run, first_sound(run / CHECKPOINTS, verified_in_run, _print_once))


def is_checkpoint(path) -> bool:
    """Return whether a path is the directory of one checkpoint."""
    return (Path(path) / ENCODER).is_file() and (Path(path) / MODEL).is_file()


def is_model_file(path) -> bool:
    """Return whether a path is the file with the model in a checkpoint's directory."""
    return Path(path).name == MODEL and is_checkpoint(Path(path).parent)


def verified(directory: Path) -> Path:
    """Return a checkpoint's directory after comparing the checksums of its model; raises Damaged.

    A checkpoint copied without its meta.json has no checksums and is accepted.
    """
    return verified_in_run(directory) if (directory / META).is_file() else directory


def verified_in_run(directory: Path) -> Path:
    """Return a checkpoint's directory after comparing the checksums of its model; raises Damaged."""
    _verify_once(directory, *(_stamp(directory / file) for file in (META, ENCODER, MODEL)))
    return directory


@functools.lru_cache
def _verify_once(directory: Path, *stamps) -> None:
    """Verify the model's files; again only after one of them has changed."""
    verify(directory, (MODEL, ENCODER))


def _stamp(file: Path):
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _print_once(text: str) -> None:
    if text not in _printed:
        _printed.add(text)
        streams.print_notice(text)

"""The copy of a run folder in storage: written by a thread beside the training, read by a start on a fresh machine.

It has the layout of the run folder. The meta.json of a checkpoint, which holds the digests of its files, is written
last and removed first, so that a half-written checkpoint has none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from maskwise.engine.checkpoint import META, directories, step_of
from maskwise.engine.run_end import FAILED, PREEMPTED
from maskwise.errors import UserError
from maskwise.storage.faults import StorageError
from maskwise.storage.store import Store

KEY = "train.mirror"
LINKS = ".mirror_"  # folders below checkpoints/ with links to the files that are being copied
CHECKPOINTS, LAST = "checkpoints", "last"
NOT_COPIED = {PREEMPTED, FAILED}


class Mirror:
    """Copy each finished checkpoint of a run folder, and the other files as they are then, to `address`.

    Enter it on the main rank. `checkpoint` returns at once: a checkpoint that is still waiting when the next one is
    finished is left out. keep: how many of the newest checkpoints stay (0: all), besides that of the step `keep_also`.
    print_line receives one line when a copy fails, which is tried again at the next checkpoint, and one at the end:
    complete, or what is missing.
    """

    def __init__(
        self,
        folder: Path,
        address: str,
        store: Store,
        keep: int,
        print_line: Callable[[str], None],
        *,
        keep_also: int = 0,
    ):
        self.folder, self.address, self.store = Path(folder), address.rstrip("/"), store
        self.keep, self.keep_also, self.print_line = keep, keep_also, print_line
        self.copied: dict[str, tuple[int, int]] = {}  # name -> size and time of the file that was copied
        self.waiting: Path | None = None  # the checkpoint's links, or its own folder
        self.failed: Path | None = None
        self.closing, self.problem = False, ""
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        for left in (self.folder / CHECKPOINTS).glob(f"{LINKS}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.thread.start()
        if present := directories(self.folder / CHECKPOINTS):
            self.checkpoint(present[0])
        return self

    def __exit__(self, kind, *exception) -> None:
        """Copy what is left, unless Ctrl-C ended the block, and print the line of the end."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        try:
            while self.thread.is_alive() and not (kind and issubclass(kind, KeyboardInterrupt)):
                self.thread.join(0.2)  # in parts, so that Ctrl-C is noticed
        finally:
            self.print_line(self.end())

    def checkpoint(self, path: Path) -> None:
        """Have a finished checkpoint copied; its files are linked first, since the run may remove it meanwhile."""
        links = path.with_name(f"{LINKS}{path.name}")
        try:
            shutil.rmtree(links, ignore_errors=True)
            links.mkdir()
            for file in path.iterdir():
                os.link(file, links / file.name)
        except OSError:  # a disk without links: the files themselves, which may be removed before they are copied
            shutil.rmtree(links, ignore_errors=True)
            links = path
        with self.changed:
            replaced, self.waiting = self.waiting, links
            self.changed.notify()
        _unlink(replaced if replaced != links else None)

    def end(self) -> str:
        """Return the line on the state of the copy."""
        if self.thread.is_alive():
            return f"mirror: {self.address} is incomplete (stopped while copying); the same command completes it"
        if self.problem:
            return f"mirror: {self.address} is incomplete: {self.problem}; the same command completes it"
        return f"mirror: {self.address} is complete"

    def _run(self) -> None:
        while True:
            with self.changed:
                while self.waiting is None and not self.closing:
                    self.changed.wait()
                path, self.waiting = self.waiting or self.failed, None
                last = self.closing
            if self.failed not in (None, path):
                _unlink(self.failed)
            self.failed = None
            self._try(path)
            with self.changed:
                if last and self.waiting is None:
                    return

    def _try(self, path: Path | None) -> None:
        before, self.problem = self.problem, ""
        try:
            self._copy_files()
            if path is not None:
                self._copy_checkpoint(path)
        except UserError as error:
            name = "the last files" if path is None else path.name.removeprefix(LINKS)
            self.problem = f"{name} could not be copied ({error})"
        except Exception as error:  # the run goes on without its mirror
            self.problem = f"{type(error).__name__}: {error}"
        if self.problem:
            self.failed = path
            if not before and not self.closing:
                self.print_line(f"mirror: {self.problem}; tried again at the next checkpoint, the run continues")
        else:
            _unlink(path)
            if before and not self.closing:
                self.print_line(f"mirror: {self.address} can be written again, nothing is missing")

    def _copy_files(self) -> None:
        """Copy the files outside checkpoints/ that have changed."""
        for name in run_files(self.folder):
            file = self.folder / name
            try:
                status = os.stat(file)
                state = (status.st_size, status.st_mtime_ns)
                if self.copied.get(name) != state:
                    self.store.upload(file, f"{self.address}/{name}")
                    self.copied[name] = state
            except (OSError, StorageError):
                if file.exists():
                    raise

    def _copy_checkpoint(self, path: Path) -> None:
        name = path.name.removeprefix(LINKS)
        place = f"{self.address}/{CHECKPOINTS}/{name}"
        present = contents_of(self.store, self.address)
        complete = f"{CHECKPOINTS}/{name}/{META}" in present
        if not complete or self.store.contents(f"{place}/{META}") != (path / META).read_bytes():
            if complete:
                self.store.remove(f"{place}/{META}")
            for file in sorted(path.iterdir(), key=lambda file: (file.name == META, file.name)):
                self.store.upload(file, f"{place}/{file.name}")
        note = self.folder / CHECKPOINTS / f"{LINKS}last"
        note.write_text(name + "\n", encoding="utf-8")
        self.store.upload(note, f"{self.address}/{CHECKPOINTS}/{LAST}")
        note.unlink()
        self._prune(present, name)

    def _prune(self, present: list[str], newest: str) -> None:
        """Remove older checkpoints than the kept ones, half-written ones, and those of later steps."""
        steps = complete_steps(present)
        earlier = sorted({name for name in steps if name < newest} | {newest}, reverse=True)
        kept = set(earlier[: self.keep] if self.keep else earlier)
        kept |= {name for name in earlier if step_of(Path(name)) == self.keep_also}
        old = [name for name in present if name.startswith(f"{CHECKPOINTS}/step_") and name.split("/")[1] not in kept]
        for name in sorted(old, key=lambda name: not name.endswith(META)):
            self.store.remove(f"{self.address}/{name}")


def run_files(folder: Path) -> list[str]:
    """List the files of a run folder outside checkpoints/, relative, without hidden and temporary ones."""
    found = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and inside / name != Path(CHECKPOINTS))
        found += [(inside / name).as_posix() for name in sorted(files) if not name.startswith(".")]
    # the recipe comes last: without it there is no run
    return sorted((name for name in found if name not in NOT_COPIED), key=lambda name: (name == "recipe.yaml", name))


def contents_of(store: Store, address: str) -> list[str]:
    """List the files at an address, relative to it."""
    base = address.rstrip("/") + "/"
    start = base.removeprefix("file://")
    return [name.removeprefix(base).removeprefix(start) for name in store.listing(base)]


def complete_steps(present: list[str]) -> list[str]:
    """List the checkpoints that were written to their end, the newest first."""
    names = [name.split("/")[1] for name in present if name.startswith(f"{CHECKPOINTS}/step_") and name.endswith(META)]
    return sorted((name for name in names if step_of(Path(name)) is not None), reverse=True)


def _unlink(links: Path | None) -> None:
    """Remove the links to a checkpoint that was copied; a checkpoint's own folder stays."""
    if links is not None and links.name.startswith(LINKS):
        with contextlib.suppress(OSError):
            shutil.rmtree(links)

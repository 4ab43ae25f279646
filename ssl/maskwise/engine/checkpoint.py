"""Checkpoints: complete, tensors only, checksummed and written atomically."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maskwise.compat import rename_tensors
from maskwise.engine.atomic_file import sync, write_atomic, write_error
from maskwise.engine.plain_tensors import plain
from maskwise.engine.run_lock import RunLock
from maskwise.errors import UserError

MODEL, OPTIMIZER, ENCODER, META = "model.safetensors", "optimizer.safetensors", "encoder.json", "meta.json"
SEAL = "0" * 64  # placeholder in meta.json for its own SHA-256 while that is computed
WRITING, REMOVING, PARTS = ".writing_", ".removing_", ".parts_"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: the state after `step` steps, on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict
    path: Path


class Checkpoints:
    """Manage the folder `checkpoints` of a run: `step_00001200/` directories and the text file `last`.

    folder: the run folder. keep: how many of the newest checkpoints stay (0: all), besides that of the step
    `keep_also`. `meta` and `encoder_spec` go into
    every checkpoint. Only the main rank of `world` writes, the others wait. print_line receives one line when a damaged
    checkpoint is skipped or an old one cannot be removed. Tensors sharded over ranks are written through `shards`, each
    rank its part. lock: that of the run folder; nothing is written after the folder was replaced. mirror: receives
    each finished checkpoint (`engine.mirror.Mirror`).
    """

    def __init__(
        self,
        folder,
        keep: int = 2,
        *,
        meta: dict | None = None,
        encoder_spec: dict | None = None,
        world=None,
        print_line: Callable[[str], None] = lambda text: None,
        shards=None,
        lock: RunLock | None = None,
        keep_also: int = 0,
        mirror=None,
    ):
        self.folder = Path(folder) / "checkpoints"
        self.keep_also = keep_also
        self.keep, self.meta, self.encoder_spec = keep, meta or {}, encoder_spec
        self.world, self.print_line, self.shards, self.lock = world, print_line, shards, lock
        self.mirror = mirror

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        meta: dict | None = None,
        encoder_spec: dict | None = None,
    ) -> Path:
        """Write the state after `step` steps, rename it into place, point `last` at it, remove old checkpoints.

        Raises UserError on every rank if the disk refuses; the earlier checkpoints then stay unchanged.
        """
        path, problem = self.folder / name(step), ""
        if self.shards:
            for file, split in ((MODEL, tensors), (OPTIMIZER, optimizer)):
                self.shards.scatter_state(self._parts(file), split)
        if self.world is None or self.world.is_main:
            try:
                self._write(
                    path,
                    step,
                    tensors,
                    optimizer,
                    {**self.meta, **(meta or {})},
                    encoder_spec or self.encoder_spec or {},
                )
            except (OSError, UserError, safetensors.SafetensorError) as error:
                problem = str(error) if isinstance(error, UserError) else write_error(f"the checkpoint {path}", error)
                self._remove_temporary(PARTS)
            else:
                if self.mirror:
                    self.mirror.checkpoint(path)
                self._prune(step)
        if self.world is None:
            failed = bool(problem)
        else:
            failed = self.world.any(bool(problem))
        if failed:
            raise UserError(problem or f"rank 0 cannot write the checkpoint {path}")
        return path

    def remove_stale(self, step: int) -> None:
        """Remove what a kill left half-written or half-removed, and surplus checkpoints before `step`."""
        if self.world is None or self.world.is_main:
            self._remove_temporary(PARTS)
            self._prune(step, later=False)

    def load_last(self) -> Checkpoint | None:
        """Load the checkpoint that `last` names or, if it is damaged, the newest sound one; None before the first.

        Raises UserError if checkpoints exist and none is sound.
        """
        return first_sound(self.folder, read, self.print_line)

    def _write(self, path, step, tensors, optimizer, meta, encoder_spec):
        if self.lock:
            self.lock.check()
        aside = self.folder / f"{WRITING}{path.name}"
        self._remove_temporary()
        aside.mkdir(parents=True)
        self._put(aside / MODEL, tensors)
        self._put(aside / OPTIMIZER, optimizer)
        (aside / ENCODER).write_text(json.dumps(encoder_spec, indent=2), encoding="utf-8")
        files = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        }
        meta = {**meta, "step": step, "versions": {**versions, **meta.get("versions", {})}, "files": files}
        (aside / META).write_text(with_checksum(meta), encoding="utf-8")
        for file in (*aside.iterdir(), aside):
            sync(file)
        if path.exists():
            os.rename(path, self.folder / f"{REMOVING}{path.name}")
        os.rename(aside, path)
        sync(self.folder)
        write_atomic(self.folder / "last", path.name + "\n")
        sync(self.folder)

    def _put(self, file, tensors):
        if self.shards:
            self.shards.gather_state(self._parts(file.name), file)
        else:
            safetensors.torch.save_file(plain(tensors), file)

    def _parts(self, file):
        return self.folder / f"{PARTS}{file}"

    def _prune(self, step, later: bool = True):
        """Keep the newest; checkpoints of later steps than the one just written are obsolete."""
        present = directories(self.folder)
        earlier = [path for path in present if step_of(path) <= step]
        old = [path for path in earlier[self.keep :] if step_of(path) != self.keep_also] if self.keep else []
        obsolete = [path for path in present if step_of(path) > step] if later else []
        try:
            for path in (*old, *obsolete):  # renamed first: a half-removed checkpoint must not look like one
                os.rename(path, self.folder / f"{REMOVING}{path.name}")
            self._remove_temporary()
        except OSError as error:
            self.print_line(f"old checkpoints stay under {self.folder} ({error.strerror}): remove them by hand")

    def _remove_temporary(self, *kinds):
        for path in (path for kind in (WRITING, REMOVING, *kinds) for path in self.folder.glob(f"{kind}*")):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / ".last").unlink(missing_ok=True)


class Damaged(Exception):
    """Signal a checkpoint that cannot be trusted; the text gives the reason."""


def name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def directories(folder) -> list[Path]:
    """List the checkpoints in a folder `checkpoints`, the newest first."""
    paths = [path for path in Path(folder).glob("step_*") if path.is_dir() and step_of(path) is not None]
    return sorted(paths, key=step_of, reverse=True)


def first_sound(folder, read: Callable[[Path], Any], print_line: Callable[[str], None]) -> Any:
    """Read the checkpoint that `last` names or, if it is damaged, the newest sound one; None where there is none.

    folder: `checkpoints` of a run. read: takes a checkpoint's directory and raises Damaged. print_line receives one
    line when another checkpoint than the last is read. Raises UserError if checkpoints exist and none is sound.
    """
    folder = Path(folder)
    candidates = directories(folder)
    if not candidates:
        return None
    try:
        last = (folder / "last").read_text(encoding="utf-8").strip()
        faults = [] if (folder / last) in candidates else [f"`last` names {last!r}, which does not exist"]
    except (OSError, UnicodeDecodeError):
        last, faults = candidates[0].name, ["`last` is missing or unreadable"]
    candidates.sort(key=lambda path: path.name != last)
    for path in candidates:
        try:
            content = read(path)
        except Damaged as fault:
            if not path.exists() and directories(folder):  # removed meanwhile by the run that is writing here
                return first_sound(folder, read, print_line)
            faults.append(f"{path.name}: {fault}")
            continue
        if faults:
            print_line(f"checkpoint damaged ({'; '.join(faults)}): using {path.name} instead")
        return content
    raise UserError(
        f"no checkpoint under {folder} is sound ({'; '.join(faults)}): restore one from a copy, or remove the "
        "folder to start again"
    )


def read(path) -> Checkpoint:
    """Read one checkpoint directory and verify its checksums; raises Damaged."""
    path = Path(path)
    meta = verify(path)
    with _damage(path):
        tensors = safetensors.torch.load_file(path / MODEL)
        optimizer = safetensors.torch.load_file(path / OPTIMIZER)
        return Checkpoint(int(meta["step"]), rename_tensors(tensors), rename_tensors(optimizer), meta, path)


def verify(path, files: tuple[str, ...] = ()) -> dict:
    """Return the content of meta.json after comparing checksums, of `files` only if given; raises Damaged."""
    path = Path(path)
    with _damage(path):
        meta = verify_checksum((path / META).read_bytes())
        for file, digest in meta["files"].items():
            if (not files or file in files) and _sha256(path / file) != digest:
                raise Damaged(f"the checksum of {file} is wrong")
        return meta


@contextlib.contextmanager
def _damage(path):
    """Raise Damaged for an error while reading a checkpoint."""
    try:
        yield
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def with_checksum(meta: dict) -> str:
    """Format meta.json with its own SHA-256 in it."""
    text = json.dumps({**meta, "sha256": SEAL}, indent=2)
    return text.replace(SEAL, hashlib.sha256(text.encode()).hexdigest())


def verify_checksum(text: bytes) -> dict:
    """Parse meta.json; raises Damaged if a byte has changed. Files written without a checksum are accepted."""
    meta = json.loads(text)
    seal = meta.pop("sha256", None)
    if seal is not None and hashlib.sha256(text.replace(seal.encode(), SEAL.encode())).hexdigest() != seal:
        raise Damaged(f"the checksum of {META} is wrong")
    return meta


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's directory, None for another name."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

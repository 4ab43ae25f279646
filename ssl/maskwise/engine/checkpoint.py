"""Checkpoints: complete, tensors only, checksummed, and either there or not there."""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maskwise.functional.errors import UserError

MODEL, OPTIMIZER, ENCODER, META = "model.safetensors", "optimizer.safetensors", "encoder.json", "meta.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: the state after `step` steps, on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict
    path: Path


class Checkpoints:
    """The folder `checkpoints` of a run folder: `step_00001200/` directories and the text file `last`.

    `folder` is the run folder; the newest `keep` checkpoints stay (0: all). `meta` and `encoder_spec` go into every
    checkpoint. Only the main rank of `world` writes; the others wait for it. `say` is handed one line when a damaged
    checkpoint is passed over.
    """

    def __init__(self, folder, keep: int = 2, *, meta: dict | None = None, encoder_spec: dict | None = None, world=None,
                 say: Callable[[str], None] = lambda text: None):
        self.folder = Path(folder) / "checkpoints"
        self.keep, self.meta, self.encoder_spec, self.world, self.say = keep, meta or {}, encoder_spec, world, say

    def save(self, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict | None = None,
             encoder_spec: dict | None = None) -> Path:
        """Write the state after `step` steps aside, move it into place, point `last` at it, prune the old ones.

        Raises UserError when the disk refuses.
        """
        path = self.folder / name(step)
        if self.world is None or self.world.is_main:
            try:
                self._write(path, step, tensors, optimizer, {**self.meta, **(meta or {})}, encoder_spec or self.encoder_spec or {})
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"cannot write the checkpoint {path} ({error}): free some space and start the same command again") from None
        if self.world is not None:
            self.world.barrier()
        return path

    def load_last(self) -> Checkpoint | None:
        """The checkpoint that `last` names or, where it is damaged, the newest sound one; None before the first.

        Raises UserError when checkpoints exist and none is sound.
        """
        candidates = self._directories()
        if not candidates:
            return None
        try:
            last = self.folder / (self.folder / "last").read_text().strip()
        except (OSError, UnicodeDecodeError):
            last = candidates[0]
        candidates.sort(key=lambda path: path != last)
        faults = []
        for path in candidates:
            try:
                found = read(path)
            except Damaged as fault:
                faults.append(f"{path.name}: {fault}")
                continue
            if faults:
                self.say(f"checkpoint damaged ({'; '.join(faults)}): continuing from {path.name} instead")
            return found
        raise UserError(f"no checkpoint under {self.folder} is sound ({'; '.join(faults)}): restore one from a copy, or remove the folder to start anew")

    def _write(self, path, step, tensors, optimizer, meta, encoder_spec):
        aside = self.folder / f".writing_{path.name}"
        for left in self.folder.glob(".writing_*"):
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        safetensors.torch.save_file(_plain(tensors), aside / MODEL)
        safetensors.torch.save_file(_plain(optimizer), aside / OPTIMIZER)
        (aside / ENCODER).write_text(json.dumps(encoder_spec, indent=2))
        files = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}
        meta = {**meta, "step": step, "versions": {**versions, **meta.get("versions", {})}, "files": files}
        (aside / META).write_text(json.dumps(meta, indent=2))
        for file in (*aside.iterdir(), aside):
            _sync(file)
        if path.exists():
            stale = self.folder / f".writing_stale_{path.name}"
            os.rename(path, stale)
        os.rename(aside, path)
        _sync(self.folder)
        pointer = self.folder / ".last"
        pointer.write_text(path.name + "\n")
        _sync(pointer)
        os.replace(pointer, self.folder / "last")
        _sync(self.folder)
        self._prune(step)

    def _prune(self, step):
        for left in self.folder.glob(".writing_*"):
            shutil.rmtree(left)
        mine = [path for path in self._directories() if _step(path) <= step]
        for path in self._directories():
            # A later step than the one just written belongs to a future that was given up.
            if path not in mine or (self.keep and path not in mine[: self.keep]):
                shutil.rmtree(path)

    def _directories(self):
        found = [path for path in self.folder.glob("step_*") if path.is_dir() and _step(path) is not None]
        return sorted(found, key=_step, reverse=True)


class Damaged(Exception):
    """A checkpoint that cannot be trusted; the text says why."""


def name(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def read(path) -> Checkpoint:
    """One checkpoint directory, verified against its checksums; raises Damaged."""
    path = Path(path)
    try:
        meta = json.loads((path / META).read_text())
        for file, digest in meta["files"].items():
            if _sha256(path / file) != digest:
                raise Damaged(f"the checksum of {file} is wrong")
        tensors = safetensors.torch.load_file(path / MODEL)
        optimizer = safetensors.torch.load_file(path / OPTIMIZER)
        return Checkpoint(int(meta["step"]), tensors, optimizer, meta, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _plain(tensors):
    """Contiguous CPU tensors that share no memory, so that every alias has an entry of its own."""
    plain, seen = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def _step(path):
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

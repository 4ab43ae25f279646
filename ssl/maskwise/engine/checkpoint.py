"""Checkpoints: complete, tensors only, checksummed, and either there or not there."""

import contextlib
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

from maskwise.engine.disk import refused, sync, write_whole
from maskwise.functional.errors import UserError

MODEL, OPTIMIZER, ENCODER, META = "model.safetensors", "optimizer.safetensors", "encoder.json", "meta.json"
SEAL = "0" * 64  # stands in meta.json for its own SHA-256 while that is computed
WRITING, REMOVING, PARTS = ".writing_", ".removing_", ".parts_"


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
    checkpoint is passed over or an old one cannot be removed. Tensors that are split over the ranks reach their file through `shards`,
    every rank writing its part.
    """

    def __init__(self, folder, keep: int = 2, *, meta: dict | None = None, encoder_spec: dict | None = None, world=None,
                 say: Callable[[str], None] = lambda text: None, shards=None):
        self.folder = Path(folder) / "checkpoints"
        self.keep, self.meta, self.encoder_spec, self.world, self.say = keep, meta or {}, encoder_spec, world, say
        self.shards = shards

    def save(self, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Tensor], meta: dict | None = None,
             encoder_spec: dict | None = None) -> Path:
        """Write the state after `step` steps aside, move it into place, point `last` at it, prune the old ones.

        Raises UserError on every rank when the disk refuses; then the checkpoints that were there are there still, and nothing besides.
        """
        path, problem = self.folder / name(step), ""
        if self.shards:
            for file, split in ((MODEL, tensors), (OPTIMIZER, optimizer)):
                self.shards.spread(self._parts(file), split)
        if self.world is None or self.world.is_main:
            try:
                self._write(path, step, tensors, optimizer, {**self.meta, **(meta or {})}, encoder_spec or self.encoder_spec or {})
            except (OSError, UserError, safetensors.SafetensorError) as error:
                problem = str(error) if isinstance(error, UserError) else refused(f"the checkpoint {path}", error)
                self._sweep(PARTS)
            else:
                self._prune(step)
        if self.world is None:
            failed = bool(problem)
        else:
            failed = self.world.any(bool(problem))
        if failed:
            raise UserError(problem or f"rank 0 cannot write the checkpoint {path}")
        return path

    def tidy(self, step: int) -> None:
        """Remove what a kill has left half-written or half-removed, and checkpoints before `step` that are too many."""
        if self.world is None or self.world.is_main:
            self._sweep(PARTS)
            self._prune(step, later=False)

    def load_last(self) -> Checkpoint | None:
        """The checkpoint that `last` names or, where it is damaged, the newest sound one; None before the first.

        Raises UserError when checkpoints exist and none is sound.
        """
        candidates = self._directories()
        if not candidates:
            return None
        newest = candidates[0].name
        try:
            last = (self.folder / "last").read_text().strip()
            faults = [] if (self.folder / last) in candidates else [f"`last` names {last!r}, which is not there"]
        except (OSError, UnicodeDecodeError):
            last, faults = newest, ["`last` is missing or unreadable"]
        candidates.sort(key=lambda path: path.name != last)
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
        aside = self.folder / f"{WRITING}{path.name}"
        self._sweep()
        aside.mkdir(parents=True)
        self._put(aside / MODEL, tensors)
        self._put(aside / OPTIMIZER, optimizer)
        (aside / ENCODER).write_text(json.dumps(encoder_spec, indent=2))
        files = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}
        meta = {**meta, "step": step, "versions": {**versions, **meta.get("versions", {})}, "files": files}
        (aside / META).write_text(sealed(meta))
        for file in (*aside.iterdir(), aside):
            sync(file)
        if path.exists():
            os.rename(path, self.folder / f"{REMOVING}{path.name}")
        os.rename(aside, path)
        sync(self.folder)
        write_whole(self.folder / "last", path.name + "\n")
        sync(self.folder)

    def _put(self, file, tensors):
        if self.shards:
            self.shards.collect(self._parts(file.name), file)
        else:
            safetensors.torch.save_file(_plain(tensors), file)

    def _parts(self, file):
        return self.folder / f"{PARTS}{file}"

    def _prune(self, step, later: bool = True):
        """Keep the newest; a later step than the one just written belongs to a future that was given up."""
        mine = [path for path in self._directories() if _step(path) <= step]
        old = mine[self.keep :] if self.keep else []
        future = [path for path in self._directories() if _step(path) > step] if later else []
        try:
            for path in (*old, *future):
                os.rename(path, self.folder / f"{REMOVING}{path.name}")  # a half-removed checkpoint must not look like one
            self._sweep()
        except OSError as error:
            self.say(f"old checkpoints stay under {self.folder} ({error.strerror}): remove them by hand")

    def _sweep(self, *kinds):
        for left in (path for kind in (WRITING, REMOVING, *kinds) for path in self.folder.glob(f"{kind}*")):
            shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / ".last").unlink(missing_ok=True)

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
        meta = unsealed((path / META).read_bytes())
        for file, digest in meta["files"].items():
            if _sha256(path / file) != digest:
                raise Damaged(f"the checksum of {file} is wrong")
        tensors = safetensors.torch.load_file(path / MODEL)
        optimizer = safetensors.torch.load_file(path / OPTIMIZER)
        return Checkpoint(int(meta["step"]), tensors, optimizer, meta, path)
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def sealed(meta: dict) -> str:
    """meta.json's text, which names its own SHA-256."""
    text = json.dumps({**meta, "sha256": SEAL}, indent=2)
    return text.replace(SEAL, hashlib.sha256(text.encode()).hexdigest())


def unsealed(text: bytes) -> dict:
    """What `sealed` made text of; raises Damaged when a byte has changed. Checkpoints of before the seal pass without."""
    meta = json.loads(text)
    seal = meta.pop("sha256", None)
    if seal is not None and hashlib.sha256(text.replace(seal.encode(), SEAL.encode())).hexdigest() != seal:
        raise Damaged(f"the checksum of {META} is wrong")
    return meta


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

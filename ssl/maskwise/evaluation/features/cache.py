"""Feature cache on disk: resumable parts, then one memory-mapped file per feature with checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskwise.engine.atomic_file import WRITE_ERRORS, write_error
from maskwise.errors import UserError
from maskwise.evaluation.features.parts import bytes_of, read_part, write_part

FORMAT = 2  # 2: crops as torchvision rounds them
PART = 4096  # about the rows of a part: the most that a killed extraction loses
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
_CHUNK = 1 << 24


class FeatureStore:
    """Features of one (weights, transform, data, precision) under folder/<hash of these>/, one subfolder per feature.

    Ranks write parts in turn into the shared folder. Raises UserError if it cannot be written or is not shared.
    """

    def __init__(self, folder, key: dict, world=None):
        self.key = {"format": FORMAT, **key}
        self.folder = (
            Path(folder).expanduser() / hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]
        )
        self.world = world
        self.rank, self.size = (0, 1) if world is None else (world.rank, world.size)

    def fetch(self, names: Sequence[str], count: int, batch_size: int, compute: Callable):
        """Load or compute features -> ({name: mapped [n, ...]}, index int64 [n], corrupt, {name: origin}).

        compute(names, rows int64 [m]) -> ({name: [m', ...]}, index [m'], corrupt) computes missing ones. count: images
        of the dataset; parts are whole batches of it.
        """
        try:
            with self._locked():
                state = self._from_rank0({name: self._state(name) for name in names} if self.rank == 0 else {})
                missing = [name for name in names if state[name] != "cached"]
                if missing:
                    resumed = self._make(missing, count, batch_size, compute)
                    for name in missing:
                        if not state[name].startswith("damaged"):
                            state[name] = "resumed" if resumed else "computed"
        except WRITE_ERRORS as error:
            raise UserError(
                f"{write_error(f'the feature cache {self.folder.parent}', error)}, or give another cache=FOLDER"
            ) from None
        stored = {name: self._open(name) for name in names}
        if any(entry is None for entry in stored.values()):
            raise UserError(
                f"rank {self.rank} cannot read the features in {self.folder}; put the cache on a disk shared by all "
                "machines"
            )
        _, index, corrupt = next(iter(stored.values()))
        for _, other, _ in stored.values():
            if not torch.equal(index, other):
                raise UserError(
                    f"the features in {self.folder} are of different images, because a file became unreadable in "
                    "between; remove that folder"
                )
        return {name: rows for name, (rows, _, _) in stored.items()}, index, corrupt, state

    def _make(self, names: list[str], count: int, batch_size: int, compute: Callable) -> bool:
        """Compute missing parts and join all; return whether some existed before."""
        length = max(1, PART // batch_size) * batch_size
        folder = self.folder / f"parts-{hashlib.sha256(repr((sorted(names), length)).encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, count, length)
        existing = {start for start in starts if read_part(folder / f"{start:09d}.safetensors", names) is not None}
        self._wait()
        for number, start in enumerate(starts):
            if number % self.size == self.rank and start not in existing:
                rows, index, corrupt = compute(names, torch.arange(start, min(count, start + length)))
                write_part(folder / f"{start:09d}.safetensors", rows, index, corrupt)
        self._wait()
        if self.rank == 0:
            parts = [folder / f"{start:09d}.safetensors" for start in starts]
            try:
                self._join(names, parts)
            finally:
                for left in self.folder.glob(f".*.{os.getpid()}"):  # of an interruption; the parts stay
                    shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        self._wait()
        return bool(existing)

    def _join(self, names: list[str], parts: list[Path]) -> None:
        """Write the parts into one temporary file per feature, in one pass, and rename each into place."""
        temporary = {name: self.folder / f".{name}.{os.getpid()}" for name in names}
        about = {name: {"shape": [0], "dtype": "float32", "digest": hashlib.sha256()} for name in names}
        corrupt, indices = {}, []
        with contextlib.ExitStack() as opened:
            files = {}
            for name, target in temporary.items():
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                files[name] = opened.enter_context(open(target / "rows.bin", "wb"))
            for part in parts:
                read = read_part(part, names)
                if read is None:
                    raise UserError(f"{part} became unreadable while it was joined; run the same command again")
                rows, index, more = read
                corrupt |= more
                indices.append(index)
                for name in names if len(index) else ():
                    block, entry = bytes_of(rows[name]), about[name]
                    files[name].write(block)
                    entry["digest"].update(block)
                    entry["shape"] = [entry["shape"][0] + len(index), *rows[name].shape[1:]]
                    entry["dtype"] = str(rows[name].dtype).removeprefix("torch.")
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        index = bytes_of(torch.cat(indices))
        for name, target in temporary.items():
            entry = about[name]
            (target / "index.bin").write_bytes(index)
            meta = {
                "shape": entry["shape"],
                "dtype": entry["dtype"],
                "sha256": entry["digest"].hexdigest(),
                "index_sha256": hashlib.sha256(index).hexdigest(),
                "corrupt": corrupt,
                "key": self.key,
            }
            (target / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.replace(target, self.folder / name)

    def _state(self, name: str) -> str:
        """Return "cached", "missing", or "damaged, computed again" (with a warning) by checksum."""
        folder = self.folder / name
        if not folder.exists():
            return "missing"
        with contextlib.suppress(OSError, ValueError, KeyError):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if (
                _digest(folder / "rows.bin") == meta["sha256"]
                and _digest(folder / "index.bin") == meta["index_sha256"]
                and meta["key"] == self.key
            ):
                return "cached"
        logging.getLogger("maskwise").warning(
            "maskwise: the cached features %s are damaged (wrong checksum); they are computed again", folder
        )
        return "damaged, computed again"

    def _open(self, name: str):
        """Return a feature's mapped rows and index, and its unreadable images; None if it is missing."""
        folder = self.folder / name
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return (
            _mapped(folder / "rows.bin", meta["shape"], meta["dtype"]),
            _mapped(folder / "index.bin", meta["shape"][:1], "int64"),
            meta["corrupt"],
        )

    @contextlib.contextmanager
    def _locked(self):
        """Hold the folder's lock on rank 0: one run at a time computes, another waits and loads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = None
        if self.rank == 0:
            with contextlib.suppress(ImportError):  # no such lock outside Unix
                import fcntl

                handle = open(self.folder / ".lock", "w", encoding="utf-8")
                fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if handle is not None:
                handle.close()

    def _from_rank0(self, mine: dict) -> dict:
        """Return the value of rank 0 on every rank."""
        return mine if self.size == 1 else self.world.gather_objects(mine)[0]

    def _wait(self) -> None:
        if self.size > 1:
            self.world.barrier()


def _mapped(path: Path, shape: Sequence[int], dtype: str) -> Tensor:
    size = 1
    for side in shape:
        size *= side
    return (
        torch.from_file(str(path), shared=False, size=size, dtype=_DTYPES[dtype]).view(*shape)
        if size
        else torch.zeros(*shape, dtype=_DTYPES[dtype])
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()

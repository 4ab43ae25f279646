"""Features on disk: made in parts, so that an interrupted extraction goes on; whole files with checksums, mapped and not read."""

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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskwise.functional.errors import UserError

FORMAT = 1
PART = 4096  # rows of a part, about: what a killed extraction may lose
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
_CHUNK = 1 << 24


class FeatureStore:
    """The features of one (weights, transform, data, precision) under folder/<hash of these>/, one subfolder a feature.

    Ranks write parts in turn and share the folder. Raises UserError where the folder cannot be written or is not shared.
    """

    def __init__(self, folder, key: dict, world=None):
        self.key = {"format": FORMAT, **key}
        self.folder = Path(folder).expanduser() / hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:24]
        self.world = world
        self.rank, self.size = (0, 1) if world is None else (world.rank, world.size)

    def fetch(self, names: Sequence[str], count: int, batch_size: int, compute: Callable):
        """Features by name, from disk or made: ({name: mapped [n, ...]}, index int64 [n], corrupt, {name: origin}).

        compute(names, rows int64 [m]) -> ({name: [m', ...]}, index [m'], corrupt) makes those that are missing. count: images of
        the set; parts are whole batches of it.
        """
        try:
            with self._alone():
                state = self._agreed({name: self._state(name) for name in names} if self.rank == 0 else {})
                missing = [name for name in names if state[name] != "cached"]
                if missing:
                    resumed = self._make(missing, count, batch_size, compute)
                    for name in missing:
                        state[name] = state[name] if state[name].startswith("damaged") else "resumed" if resumed else "computed"
        except OSError as error:
            raise UserError(f"the feature cache {self.folder.parent} cannot be used: {error.strerror or error}; give another cache=FOLDER") from None
        found = {name: self._open(name) for name in names}
        unseen = [name for name, one in found.items() if one is None]
        if unseen:
            raise UserError(f"the features in {self.folder} are not there for rank {self.rank}; put the cache on a disk that all machines share")
        _, index, corrupt = next(iter(found.values()))
        for _, other, _ in found.values():
            if not torch.equal(index, other):
                raise UserError(f"the features in {self.folder} are of different images, so a file became unreadable in between; remove that folder")
        return {name: rows for name, (rows, _, _) in found.items()}, index, corrupt, state

    def _make(self, names: list[str], count: int, batch_size: int, compute: Callable) -> bool:
        """Compute the parts that are not there, join them; returns whether some were there."""
        length = max(1, PART // batch_size) * batch_size
        folder = self.folder / f"parts-{hashlib.sha256(repr((sorted(names), length)).encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, count, length)
        there = {start for start in starts if _read_part(folder / f"{start:09d}.safetensors", names) is not None}
        self._wait()
        for number, start in enumerate(starts):
            if number % self.size == self.rank and start not in there:
                rows, index, corrupt = compute(names, torch.arange(start, min(count, start + length)))
                _write_part(folder / f"{start:09d}.safetensors", rows, index, corrupt)
        self._wait()
        if self.rank == 0:
            parts = [folder / f"{start:09d}.safetensors" for start in starts]
            self._join(names, parts)
            shutil.rmtree(folder, ignore_errors=True)
        self._wait()
        return bool(there)

    def _join(self, names: list[str], parts: list[Path]) -> None:
        """Write the parts as one file a feature, aside, in one pass over them, and then put each in place whole."""
        asides = {name: self.folder / f".{name}.{os.getpid()}" for name in names}
        about = {name: {"shape": [0], "dtype": "float32", "digest": hashlib.sha256()} for name in names}
        corrupt, indices = {}, []
        with contextlib.ExitStack() as opened:
            files = {}
            for name, aside in asides.items():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                files[name] = opened.enter_context(open(aside / "rows.bin", "wb"))
            for part in parts:
                read = _read_part(part, names)
                if read is None:
                    raise UserError(f"{part} has become unreadable while it was joined; run the same command again")
                rows, index, more = read
                corrupt |= more
                indices.append(index)
                for name in names if len(index) else ():
                    block, known = _bytes(rows[name]), about[name]
                    files[name].write(block)
                    known["digest"].update(block)
                    known["shape"] = [known["shape"][0] + len(index), *rows[name].shape[1:]]
                    known["dtype"] = str(rows[name].dtype).removeprefix("torch.")
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        index = _bytes(torch.cat(indices))
        for name, aside in asides.items():
            known = about[name]
            (aside / "index.bin").write_bytes(index)
            meta = {
                "shape": known["shape"], "dtype": known["dtype"], "sha256": known["digest"].hexdigest(),
                "index_sha256": hashlib.sha256(index).hexdigest(), "corrupt": corrupt, "key": self.key,
            }  # fmt: skip
            (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.replace(aside, self.folder / name)

    def _state(self, name: str) -> str:
        """cached, missing, or damaged; a checksum decides, and says so."""
        folder = self.folder / name
        if not folder.exists():
            return "missing"
        with contextlib.suppress(OSError, ValueError, KeyError):
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if _digest(folder / "rows.bin") == meta["sha256"] and _digest(folder / "index.bin") == meta["index_sha256"] and meta["key"] == self.key:
                return "cached"
        logging.getLogger("maskwise").warning("maskwise: the cached features %s are damaged (their checksum does not fit); they are made anew", folder)
        return "damaged, made anew"

    def _open(self, name: str):
        """A feature's rows and index, mapped, and its unreadable images; None where it is not there."""
        folder = self.folder / name
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return _mapped(folder / "rows.bin", meta["shape"], meta["dtype"]), _mapped(folder / "index.bin", meta["shape"][:1], "int64"), meta["corrupt"]

    @contextlib.contextmanager
    def _alone(self):
        """One run at a time makes features in this folder; another waits and then finds them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = None
        if self.rank == 0:
            with contextlib.suppress(ImportError):  # no such lock outside Unix
                import fcntl

                handle = open(self.folder / ".lock", "w")
                fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if handle is not None:
                handle.close()

    def _agreed(self, mine: dict) -> dict:
        """What rank 0 found, on every rank."""
        return mine if self.size == 1 else self.world.gather_objects(mine)[0]

    def _wait(self) -> None:
        if self.size > 1:
            self.world.barrier()


def _mapped(path: Path, shape: Sequence[int], dtype: str) -> Tensor:
    size = 1
    for side in shape:
        size *= side
    return torch.from_file(str(path), shared=False, size=size, dtype=_DTYPES[dtype]).view(*shape) if size else torch.zeros(*shape, dtype=_DTYPES[dtype])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _write_part(path: Path, rows: dict[str, Tensor], index: Tensor, corrupt: dict) -> None:
    tensors = {**{f"rows.{name}": part.contiguous() for name, part in rows.items()}, "index": index}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, aside, metadata={"sha256": _tensors_digest(tensors), "corrupt": json.dumps(corrupt)})
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def _read_part(path: Path, names: Sequence[str]):
    """A part's ({name: rows}, index, corrupt), or None where it is missing, damaged or of other features."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if _tensors_digest(tensors) != meta["sha256"]:
            return None
        return {name: tensors[f"rows.{name}"] for name in names}, tensors["index"], json.loads(meta["corrupt"])
    except Exception:  # safetensors raises its own types for a torn file: such a part is made again
        return None

"""Parts of an extraction on disk: features of some rows, written atomically with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from maskwise.engine.plain_tensors import plain


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    return memoryview(tensor.contiguous().flatten().view(uint8).numpy())


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def write_part(path: Path, rows: dict[str, Tensor], index: Tensor, corrupt: dict) -> None:
    """Write a part: {name: rows [m, ...]}, index int64 [m], unreadable images by name."""
    tensors = plain({**{f"rows.{name}": part for name, part in rows.items()}, "index": index})
    target = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, target, metadata={"sha256": _tensors_digest(tensors), "corrupt": json.dumps(corrupt)})
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    os.replace(target, path)


def read_part(path: Path, names: Sequence[str]):
    """Read a part's ({name: rows}, index, corrupt); None if missing, damaged or of other features."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if _tensors_digest(tensors) != meta["sha256"]:
            return None
        return {name: tensors[f"rows.{name}"] for name in names}, tensors["index"], json.loads(meta["corrupt"])
    except Exception:  # safetensors raises its own types for a truncated file: such a part is computed again
        return None


def part_size(path: Path) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the number of rows of a part and the shape of one row of each feature, without reading these."""
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return shapes["index"][0], {
        key.removeprefix("rows."): shape[1:] for key, shape in shapes.items() if key.startswith("rows.")
    }

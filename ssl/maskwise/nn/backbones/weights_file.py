"""Reading of weights files: safetensors and torch's format; tensors only, nothing in a file is executed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch

from maskwise.compat import plain_scalar
from maskwise.errors import UserError
from maskwise.nn.backbones import file_kinds

# Packages whose objects stand next to the tensors in files of Lightning (solo-learn, lightly); they are dropped.
SETTINGS = ("omegaconf", "lightning", "lightning_fabric", "pytorch_lightning", "lightly", "pathlib", "typing")
PLAIN_TYPES = ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes", "object")  # as omegaconf names them
# lightly-train's checkpoints hold its modules, too; the tensors are read from the state dict beside them.
MODULES = ("lightly_train", "torch", "timm", "torchvision", "functools", "builtins")


class _Nothing:
    """Stand in for an object that is not read; takes any arguments and state."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _NothingDict:
    """Stand in for a subclass of dict that is not read."""

    def __new__(cls, *args, **kwargs):
        return {}


def read_tensors(path: str | Path) -> dict:
    """Read a weights file: safetensors, or torch's format.

    Besides tensors, only what published training files hold is allowed: an argparse Namespace and NumPy scalars are
    read, settings of omegaconf and Lightning are dropped. Raises UserError for a missing or unreadable file and for
    one that would run code; nothing of it is executed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path (files are local; nothing is downloaded)")
    try:
        kind = file_kinds.foreign(path)
        if kind is None:
            with open(path, "rb") as file:
                content = _load(path, file_kinds.is_safetensors(file.read(file_kinds.HEAD)))
    except Exception as error:  # pickle, zip, safetensors and OS errors alike
        raise UserError(
            f"cannot read weights from {path}: {reading_error(error)}; "
            "give a .safetensors file or a state dict saved by torch"
        ) from None
    if kind is not None:
        raise UserError(f"cannot read weights from {path}: this is {kind[0]}: {kind[1]}")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors: give a state dict")
    return content


def _load(path: Path, is_safetensors: bool) -> dict:
    if is_safetensors:
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return _load_pickled(path, allowed())
    except Exception:
        stand_ins = settings_of(path)
        if not stand_ins:
            raise
    return _load_pickled(path, [*allowed(), *stand_ins])


def _load_pickled(path: Path, classes: list) -> dict:
    with torch.serialization.safe_globals(classes), open(path, "rb") as file:  # by content, whatever the file's name
        return torch.load(file, map_location="cpu", weights_only=True)


def allowed() -> list:
    """Return the classes allowed besides tensors; NumPy's scalar under both of its module names."""
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    scalars = [(plain_scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
    return [argparse.Namespace, np.dtype, *dtypes, *scalars]


def settings_of(path: Path) -> list[tuple[type, str]]:
    """Return stand-ins for the settings in a file of Lightning; [] if it holds anything else that is not allowed."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of another kind; the first error says what it is
        return []
    packages = (*SETTINGS, *MODULES) if any(name.startswith("lightly_train.") for name in names) else SETTINGS
    plain = {"collections.defaultdict", *(f"builtins.{name}" for name in PLAIN_TYPES)}
    if not names or any(name.partition(".")[0] not in packages and name not in plain for name in names):
        return []
    return [(_NothingDict if name.endswith(("AttributeDict", "defaultdict")) else _Nothing, name) for name in names]


def reading_error(error: Exception) -> str:
    """Return the first line of an error; for a refused pickle, name what it contains besides tensors."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if "Weights only load failed" not in first and "Unsupported" not in str(error):
        return first
    pickled = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)|GLOBAL ([\w.]+)", str(error))
    name = (pickled[1] or pickled[2]) if pickled else ""
    if "sharded_tensor" in name or "DTensor" in str(error):
        return (
            "it is one rank's part of a sharded checkpoint (FSDP); "
            "gather it in the code that wrote it, or give the teacher_checkpoint.pth of its evaluations"
        )
    return f"it holds more than tensors{f' ({name})' if name else ''} and would run code on loading"

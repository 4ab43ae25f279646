"""Unpickle published annotations as plain data: numbers, text, containers and NumPy arrays; no code can run."""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from maskwise.compat import plain_scalar
from maskwise.errors import UserError


class _SafeDtype:
    """Replace numpy.dtype, limited to numbers, text and objects: NumPy would accept any state, forged pointers too."""

    def __init__(self, text="", align=False, copy=False):
        if not isinstance(text, str) or np.dtype(text).kind not in "biufcSUO":
            raise pickle.UnpicklingError("elements that are not numbers, text or objects")
        self.dtype = np.dtype(text)

    def __setstate__(self, state):
        order, *rest = state[1:5]
        if any(part is not None for part in rest) or order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("elements of several parts")
        self.dtype = self.dtype.newbyteorder(order)


class _SafeArray(np.ndarray):
    """Restore objects from a list and other elements from bytes only."""

    def __setstate__(self, state):
        version, shape, dtype, fortran, content = state
        if not isinstance(dtype, _SafeDtype) or dtype.dtype.hasobject != isinstance(content, list):
            raise pickle.UnpicklingError("an inconsistent array")
        super().__setstate__((version, shape, dtype.dtype, fortran, content))


class _ArrayType:
    """Replace numpy.ndarray, which files name but never call."""


def _array(subtype, shape, dtype):
    """Create an empty array, filled by its state later; the subclass in the file is ignored."""
    return np.ndarray.__new__(_SafeArray, (0,), "b")


def _scalar(dtype, data=b""):
    if not isinstance(dtype, _SafeDtype):
        raise pickle.UnpicklingError("a number of an unknown type")
    return plain_scalar(dtype.dtype, data)


def _encode(text, encoding="latin1", errors="strict"):
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return codecs.encode(text, encoding, errors)


def _empty_bytes():
    return b""  # as the oldest protocols write it


def _frombuffer(buffer, dtype, shape, order):
    if not isinstance(dtype, _SafeDtype) or dtype.dtype.hasobject:
        raise pickle.UnpicklingError("an inconsistent array")
    return np.frombuffer(buffer, dtype=dtype.dtype).reshape(shape, order=order)


ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _SafeDtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickle the names in ALLOWED only."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it requires {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, key):
        raise pickle.UnpicklingError("it requires another file")


def read_pickle(path: Path, dataset: str, encoding: str = "latin1"):
    """Read a pickle of plain data. Raises UserError for a damaged file and for any other content."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{dataset}: cannot read {path}: {error.strerror}; give the file as published") from None
    try:
        return RestrictedUnpickler(io.BytesIO(content), encoding=encoding).load()
    except Exception as error:  # damaged pickles raise nearly every type
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{dataset}: {path} is not plain pickled data ({reason}); it was not opened, give the file as published"
        ) from None

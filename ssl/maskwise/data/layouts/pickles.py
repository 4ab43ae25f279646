"""Pickled ground truth read as data: numbers, text, containers and NumPy arrays, and nothing that could run."""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from maskwise.functional.errors import UserError


class _Kind:
    """What a file says of an array's elements: numbers, text or objects. NumPy's own dtype would believe any state it is handed, forged pointers included."""

    def __init__(self, text="", align=False, copy=False):
        if not isinstance(text, str) or np.dtype(text).kind not in "biufcSUO":
            raise pickle.UnpicklingError("elements that are no numbers, text or objects")
        self.made = np.dtype(text)

    def __setstate__(self, state):
        order, *rest = state[1:5]
        if any(part is not None for part in rest) or order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("elements of several parts")
        self.made = self.made.newbyteorder(order)


class _Array(np.ndarray):
    """An array that takes its elements as a list where they are objects and as bytes where they are not, and no other way."""

    def __setstate__(self, state):
        version, shape, kind, fortran, content = state
        if not isinstance(kind, _Kind) or kind.made.hasobject != isinstance(content, list):
            raise pickle.UnpicklingError("an array that is not what it says")
        super().__setstate__((version, shape, kind.made, fortran, content))


class _Name:
    """Stands for NumPy's array type, which files name and nobody needs to call."""


def _array(subtype, shape, kind):
    """An empty array to be filled by its state, whatever subclass the file asks for."""
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(kind, data=b""):
    if not isinstance(kind, _Kind):
        raise pickle.UnpicklingError("a number that is not what it says")
    return plain_scalar(kind.made, data)


def plain_scalar(dtype, data=b""):
    """A number or text from its bytes. Raises UnpicklingError where it is to be anything else."""
    data = data.encode("latin1") if isinstance(data, str) else data
    if getattr(dtype, "kind", "V") not in "biufcSU":
        raise pickle.UnpicklingError("an object hidden in a number")
    return np.frombuffer(data, dtype=np.dtype(dtype.str), count=1)[0]


def _encode(text, encoding="latin1", errors="strict"):
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return codecs.encode(text, encoding, errors)


def _nothing():
    return b""  # as the oldest protocols write it


def _frombuffer(buffer, dtype, shape, order):
    if not isinstance(dtype, _Kind) or dtype.made.hasobject:
        raise pickle.UnpicklingError("an array that is not what it says")
    return np.frombuffer(buffer, dtype=dtype.made).reshape(shape, order=order)


ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _nothing,
    ("collections", "OrderedDict"): OrderedDict,
}


class Restricted(pickle.Unpickler):
    """An unpickler that knows the names in ALLOWED and refuses every other."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, key):
        raise pickle.UnpicklingError("it asks for another file")


def read_pickle(path: Path, what: str, encoding: str = "latin1"):
    """What a pickle of plain data holds; raises UserError for a file that is damaged or asks for anything else."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what}: cannot read {path}: {error.strerror}; give the file as published") from None
    try:
        return Restricted(io.BytesIO(content), encoding=encoding).load()
    except Exception as error:  # damaged pickles raise nearly every type there is
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{what}: {path} is not plain pickled data ({reason}); it was not opened, give the file as published") from None

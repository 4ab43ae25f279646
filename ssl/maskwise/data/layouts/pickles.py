"""Pickled ground truth read as data: numbers, text, containers and NumPy arrays, and nothing that could run."""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from maskwise.functional.errors import UserError


def _array(subtype, shape, kind):
    """An empty array to be filled by its state, whatever subclass the file asks for."""
    return np.ndarray.__new__(np.ndarray, shape, kind)


def _scalar(dtype: np.dtype, data=b""):
    data = data.encode("latin1") if isinstance(data, str) else data
    if dtype.hasobject:
        raise pickle.UnpicklingError("an object hidden in a number")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _encode(text, encoding="latin1", errors="strict"):
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return codecs.encode(text, encoding, errors)


def _frombuffer(buffer, dtype, shape, order):
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
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

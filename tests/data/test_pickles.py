"""Pickled ground truth: every sort of plain array arrives, and nothing is believed that a forger could have written."""

import pickle

import numpy as np
import pytest
import torch

from maskwise.data.layouts.pickles import plain_scalar, read_pickle
from maskwise.functional.errors import UserError

try:
    from numpy._core import multiarray
except ImportError:
    from numpy.core import multiarray

ARRAYS = {
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big end": np.arange(5, dtype=">i4"), "bool": np.array([True, False]),
    "text": np.array(["a", "bcd"]), "bytes": np.array([b"a", b"bc"]), "complex": np.array([1 + 2j]), "none": np.zeros((0, 3)),
    "objects": np.array([[1, 2], "x", None], dtype=object), "scalar": np.float64(2.5), "character": np.str_("abc"), "deep": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ARRAYS)
def test_plain_arrays_arrive(tmp_path, name, protocol):
    content = pickle.dumps({"x": ARRAYS[name]}, protocol=protocol)
    (tmp_path / "x.pkl").write_bytes(content)
    found = read_pickle(tmp_path / "x.pkl", "ground truth")["x"]
    assert np.array_equal(found, ARRAYS[name]) and found.dtype == pickle.loads(content)["x"].dtype


class Call:
    """Pickles as a call, with a state to be set afterwards."""

    def __init__(self, function, arguments, *state):
        self.parts = (function, arguments, *state)

    def __reduce__(self):
        return self.parts


def forged(kind="O8", flags=0, parts=(None, None, None)):
    """A dtype of Python objects that says it holds none: whoever believes it takes bytes for pointers."""
    return Call(np.dtype, (kind, False, True), (3, "|", *parts, -1, -1, flags))


FORGERIES = {
    "scalar": lambda: Call(multiarray.scalar, (forged(), b"A" * 8)),
    "array": lambda: Call(multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), forged(), False, b"A" * 8)),
    "list for numbers": lambda: Call(multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("f8"), False, [object])),
    "fields": lambda: Call(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
    "fields of a number": lambda: forged("f8", 1, (None, ("a",), {"a": (np.dtype("O"), 0)})),
    "array over bytes": lambda: Call(np.ndarray, ((1,), np.dtype("O"), b"A" * 8)),
    "a petabyte": lambda: Call(np.ndarray, ((1 << 50,),)),
    "short": lambda: Call(multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 40,), np.dtype("f8"), False, b"A" * 8)),
    "dates": lambda: np.datetime64("2020-01-01"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_arrays_are_refused(tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"x": FORGERIES[name]()}, protocol=2))
    with pytest.raises(UserError, match="not plain pickled data") as caught:
        read_pickle(tmp_path / "x.pkl", "ground truth")
    assert "\n" not in str(caught.value)


def test_numbers_of_training_files_are_made_by_us(tmp_path):
    from maskwise.export.pickles import allowed, read

    assert multiarray.scalar not in [each[0] for each in allowed() if isinstance(each, tuple)]
    torch.save({"lr": np.float64(0.5), "epoch": np.int64(3), "w": torch.ones(2)}, tmp_path / "x.pth")
    found = read(tmp_path / "x.pth")
    assert found["lr"] == 0.5 and found["epoch"] == 3
    torch.save({"lr": FORGERIES["scalar"]()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="more than tensors"):
        read(tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        plain_scalar(np.dtype("O"), b"A" * 8)

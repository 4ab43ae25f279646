"""Safe unpickling: every kind of plain array is read, and forged states are refused."""

import pickle

import numpy as np
import pytest
import torch

from maskwise.data.benchmark_sets.safe_pickle import plain_scalar, read_pickle
from maskwise.errors import UserError

try:
    from numpy._core import multiarray
except ImportError:
    from numpy.core import multiarray

ARRAYS = {
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big end": np.arange(5, dtype=">i4"),
    "bool": np.array([True, False]),
    "text": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b"bc"]),
    "complex": np.array([1 + 2j]),
    "none": np.zeros((0, 3)),
    "objects": np.array([[1, 2], "x", None], dtype=object),
    "scalar": np.float64(2.5),
    "character": np.str_("abc"),
    "deep": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ARRAYS)
def test_plain_arrays_are_read(tmp_path, name, protocol):
    content = pickle.dumps({"x": ARRAYS[name]}, protocol=protocol)
    (tmp_path / "x.pkl").write_bytes(content)
    result = read_pickle(tmp_path / "x.pkl", "ground truth")["x"]
    assert np.array_equal(result, ARRAYS[name]) and result.dtype == pickle.loads(content)["x"].dtype


class Call:
    """Pickle as a call with a state to set afterwards."""

    def __init__(self, function, arguments, *state):
        self.parts = (function, arguments, *state)

    def __reduce__(self):
        return self.parts


def forged(kind="O8", flags=0, parts=(None, None, None)):
    """Build a dtype of Python objects with forged flags, by which bytes would be read as pointers."""
    return Call(np.dtype, (kind, False, True), (3, "|", *parts, -1, -1, flags))


FORGERIES = {
    "scalar": lambda: Call(multiarray.scalar, (forged(), b"A" * 8)),
    "array": lambda: Call(multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), forged(), False, b"A" * 8)),
    "list for numbers": lambda: Call(
        multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("f8"), False, [object])
    ),
    "fields": lambda: Call(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
    "fields of a number": lambda: forged("f8", 1, (None, ("a",), {"a": (np.dtype("O"), 0)})),
    "array over bytes": lambda: Call(np.ndarray, ((1,), np.dtype("O"), b"A" * 8)),
    "a petabyte": lambda: Call(np.ndarray, ((1 << 50,),)),
    "short": lambda: Call(
        multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 40,), np.dtype("f8"), False, b"A" * 8)
    ),
    "dates": lambda: np.datetime64("2020-01-01"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_arrays_are_refused(tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"x": FORGERIES[name]()}, protocol=2))
    with pytest.raises(UserError, match="not plain pickled data") as caught:
        read_pickle(tmp_path / "x.pkl", "ground truth")
    assert "\n" not in str(caught.value)


def test_scalars_of_training_files_are_rebuilt_safely(tmp_path):
    from maskwise.nn.backbones.weights_file import allowed, read_tensors

    assert multiarray.scalar not in [entry[0] for entry in allowed() if isinstance(entry, tuple)]
    torch.save({"lr": np.float64(0.5), "epoch": np.int64(3), "w": torch.ones(2)}, tmp_path / "x.pth")
    result = read_tensors(tmp_path / "x.pth")
    assert result["lr"] == 0.5 and result["epoch"] == 3
    torch.save({"lr": FORGERIES["scalar"]()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="more than tensors"):
        read_tensors(tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        plain_scalar(np.dtype("O"), b"A" * 8)

"""Files that others pickled: tensors, a run's arguments and NumPy's numbers are read; code never runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import yaml

from maskwise.data.layouts.pickles import plain_scalar
from maskwise.nn.weights import read_tensors


def read(path: str | Path) -> dict:
    """The content of a weights file, safetensors or torch's own format.

    Beside tensors only what published training files hold is let in (attmask.md 6.4): an argparse Namespace and NumPy's
    scalars. Raises UserError for anything else, naming it, and executes none of it.
    """
    return read_tensors(path, allowed())


def allowed() -> list:
    """The classes that may stand in a training file beside tensors, NumPy's scalars under either of NumPy's names."""
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    scalars = [(plain_scalar, f"{place}.multiarray.scalar") for place in ("numpy.core", "numpy._core")]
    return [argparse.Namespace, np.dtype, *dtypes, *scalars]


class Tolerant(yaml.SafeLoader):
    """YAML with Python's tuple tags read as lists and every other Python tag as nothing."""


def _python(loader, suffix, node):
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None


Tolerant.add_multi_constructor("tag:yaml.org,2002:python/", _python)


def arguments(content: dict, path: Path) -> dict:
    """A training file's own arguments, or those of a configs.yaml or args.yaml beside it; {} where there are none."""
    held = content.get("args")
    if isinstance(held, argparse.Namespace):
        return vars(held)
    for name in ("configs.yaml", "args.yaml"):
        try:
            found = yaml.load((path.parent / name).read_text(), Loader=Tolerant)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            return found
    return {}

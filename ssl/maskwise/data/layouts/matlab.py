"""MATLAB files of annotations, read through SciPy."""

from __future__ import annotations

from pathlib import Path

from maskwise.functional.errors import UserError


def read_mat(path: Path, what: str, *keys: str) -> list:
    """The named variables of a .mat file; raises UserError where SciPy, the file or a variable is missing."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{what}: reading {path.name} needs SciPy: pip install 'maskwise[eval]'") from None
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # SciPy raises many types for a damaged file
        raise UserError(f"{what}: cannot read {path} ({' '.join(str(error).split())[:120]}); unpack the dataset again") from None
    lacking = [key for key in keys if key not in content]
    if lacking:
        raise UserError(f"{what}: {path} has no variable {lacking[0]}; give the file as published")
    return [content[key] for key in keys]

"""Read MATLAB annotation files with SciPy."""

from __future__ import annotations

from pathlib import Path

from maskwise.errors import UserError


def read_mat(path: Path, dataset: str, *keys: str) -> list:
    """Read named variables of a .mat file. Raises UserError where SciPy, the file or a variable is missing."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{dataset}: reading {path.name} needs SciPy: pip install 'maskwise[eval]'") from None
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # SciPy raises many types for a damaged file
        raise UserError(
            f"{dataset}: cannot read {path} ({' '.join(str(error).split())[:120]}); unpack the dataset again"
        ) from None
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{dataset}: {path} has no variable {missing[0]}; give the file as published")
    return [content[key] for key in keys]

"""Labels as they come from tables: numbering, missing ones, and the reason why a dataset has none."""

import math
import re
from collections.abc import Sequence

import numpy as np

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")  # digits of other scripts and superscripts are text


def number_labels(values: list[str]) -> tuple[np.ndarray, list[str]]:
    """Number labels -> int64 labels and class names; whole numbers sort numerically, other labels alphabetically."""
    kinds = sorted(set(values))
    if all(WHOLE_NUMBER.fullmatch(kind) for kind in kinds):
        kinds.sort(key=int)
    index = {kind: k for k, kind in enumerate(kinds)}
    return np.fromiter((index[value] for value in values), dtype=np.int64, count=len(values)), kinds


def column_labels(
    values: Sequence, names: Sequence[str] | None = None
) -> tuple[np.ndarray | None, list[str] | None, str | None]:
    """Number the values of a typed column -> int64 labels, class names and None, or (None, None, the reason).

    values: all text, integers, whole floats or booleans; with `names`, indices into them. None, NaN, empty text and -1
    are missing, but -1 and 1 alone are two classes. A column that lacks some or all labels has none.
    """
    if unusable := next((value for value in values if not isinstance(value, (str, int, float, type(None)))), None):
        return None, None, f"holds values such as {str(unusable)[:40]}, not one label per image"
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    if any(isinstance(value, float) and not math.isnan(value) for value in values):
        return None, None, "holds numbers with a fraction, not classes"
    signs = names is None and set(values) == {-1, 1}
    missing = [row for row, value in enumerate(values) if is_missing(value) and not signs]
    if len(missing) == len(values):
        return None, None, "has no label in any row"
    if missing:
        return None, None, f"has no label in {len(missing)} of {len(values)} rows (the first: row {missing[0]})"
    if names is None:
        kinds = sorted(set(values))
        index = {kind: k for k, kind in enumerate(kinds)}
        return np.array([index[value] for value in values], dtype=np.int64), [str(kind) for kind in kinds], None
    labels = np.asarray(values, dtype=np.int64)
    if labels.min() < 0 or labels.max() >= len(names):
        wrong = next(value for value in values if not 0 <= value < len(names))
        return None, None, f"has label {wrong}, and there are {len(names)} classes"
    return labels, list(names), None


def why_unlabeled(dataset, what: str) -> str:
    """Return why a dataset has no labels and the remedy; `what` names its images where it gives no reason itself."""
    return getattr(dataset, "no_labels", None) or f"{what} have no labels; give one subfolder per class"


def is_missing(value) -> bool:
    """Return whether a value of a label column means that there is no label."""
    return value is None or value == "" or value == -1 or value != value

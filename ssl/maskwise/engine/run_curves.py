"""Records of a run: which lines of metrics.jsonl are sound, and (step, value) curves of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

Points = list[tuple[float, float]]

# keys of logged steps that are drawn wherever a run is, with the names of their curves
LOSSES = {"loss": "training loss", "cls": "loss of the CLS token", "patch": "loss of masked patches"}
TARGETS = {"teacher_entropy": "mean entropy", "teacher_spread": "entropy of the mean"}
ACCURACY = "k-NN accuracy of the teacher (%)"


def curve(records: Iterable[dict], key: str) -> Points:
    """Return (step, value) of the logged steps with a finite number under this key."""
    return [(record["step"], record[key]) for record in records if "loss" in record and is_number(record.get(key))]


def report_curve(records: Iterable[dict], report: str, key: str) -> Points:
    """Return (step, value) of the reports of one evaluation with a finite number under this key."""
    found = [record for record in records if record.get("report") == report]
    return [(record["step"], record["numbers"][key]) for record in found if is_number(record["numbers"].get(key))]


def is_number(value) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_record(record) -> bool:
    """Return whether a line of metrics.jsonl is a mapping with a step, and with numbers if it is a report."""
    if not isinstance(record, dict) or not is_number(record.get("step", 0)):
        return False
    return "report" not in record or isinstance(record.get("numbers"), dict)

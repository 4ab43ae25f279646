"""Records of a metrics.jsonl: those up to a step, and what was logged after it."""

import json
import math
from pathlib import Path

from maskwise.compat import RENAMED_METRICS
from maskwise.engine.loggers import TRAIN
from maskwise.engine.run_curves import is_record


def read_records(path, step: float = math.inf) -> tuple[list[dict], int]:
    """Read the records of a metrics.jsonl up to a step, under present names; returns them and their length in bytes."""
    records: list[dict] = []
    length = 0
    if not Path(path).exists():
        return records, length
    for text in Path(path).read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(text)
        except ValueError:
            break
        if not text.endswith(b"\n") or not is_record(record) or record.get("step", 0) > step:
            break
        records.append({RENAMED_METRICS.get(key, key): value for key, value in record.items()})
        length += len(text)
    return records, length


def logged_after(folder: Path, step: int) -> set[tuple[int, str]]:
    """Return (step, kind) of the records and pictures that an earlier start wrote after a step, as in `Loggers`."""
    records = read_records(folder / "metrics.jsonl")[0]
    later = [record for record in records if record.get("step", 0) > step and "alarm" not in record]
    logged = {(record["step"], record.get("report", TRAIN)) for record in later}
    for picture in folder.glob("pictures/*_step_*.png"):
        name, _, at = picture.stem.rpartition("_step_")
        logged |= {(int(at), name)} if at.isdigit() and int(at) > step else set()
    return logged

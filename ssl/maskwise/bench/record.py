"""Record of a measurement at the head of its JSON file: command, commit, date, seed, machine.

A file of results is one object: `record` with FIELDS and possibly MORE, then the measured content. A field that is not
known is null.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from pathlib import Path

from maskwise import __version__
from maskwise.engine.atomic_file import write_atomic

TEXTS = (str, type(None))
FIELDS = {
    "command": TEXTS,
    "commit": (str, list, type(None)),  # a list where parts of the file were measured at several commits
    "clean": (bool, type(None)),  # whether all files were as in the commit
    "date": TEXTS,  # year-month-day, of the last part
    "seed": (int, list, type(None)),
    "hardware": TEXTS,
    "threads": (int, list, type(None)),
    "torch": (str, list, type(None)),
}
MORE = {
    "time": (str,),
    "load": (list, type(None)),  # of the machine, over 1, 5 and 15 minutes
    "platform": (str,),
    "capability": (str,),
    "python": (str,),
    "maskwise": (str,),
    "note": (str,),
}


def describe(device=None, seed: int | list[int] | None = None, command: str | None = None) -> dict:
    """Return the record of a measurement made by this process; call it before a result is written.

    device: a torch.device (default: the CPU); seed: of the measured content; command: this process's by default.
    """
    import torch

    from maskwise.bench.machine import processor
    from maskwise.build.running.run_folder import commit  # imported late: the memory of benchmark processes is measured

    on_gpu = device is not None and device.type == "cuda"
    return {
        "command": command or own_command(),
        **checkout(commit()),
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": time.strftime("%H:%M:%S"),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "platform": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "maskwise": __version__,
    }


def checkout(commit: str | None) -> dict:
    """Split a commit with a possible `+` for changed files into `commit` and `clean`."""
    if commit is None:
        return {"commit": None, "clean": None}
    return {"commit": commit.removesuffix("+"), "clean": not commit.endswith("+")}


def own_command() -> str:
    """Return the command of this process, with folders of the machine taken off."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name, words = Path(sys.argv[0]), sys.argv[1:]
    if spec is not None and (module := spec.name.removesuffix(".__main__")) != "maskwise":
        program = f"python -m {module}"
    else:
        program = f"python {name.name}" if name.suffix == ".py" and spec is None else "maskwise"
    return without_folders(" ".join([program, *words]))


def without_folders(command: str) -> str:
    """Return a command whose absolute paths are shortened to their last name."""
    return re.sub(r"(?<![^\s=])/\S*/(?=\S)", "", command)


def continued(earlier: dict, now: dict) -> dict:
    """Return the record of a file to which parts are added: both commits, clean if both are."""
    commits = [*listed(earlier["commit"]), *listed(now["commit"])]
    states = {earlier["clean"], now["clean"]}
    commits = list(dict.fromkeys(commits)) if None not in (earlier["commit"], now["commit"]) else [None]
    return {
        **now,
        "commit": commits[0] if len(commits) == 1 else commits,
        "clean": False if False in states else None if None in states else True,
    }


def listed(value) -> list:
    """Return a value as a list."""
    return value if isinstance(value, list) else [value]


def mistakes(result: dict) -> list[str]:
    """Return what a file of results lacks or has in another form than FIELDS and MORE."""
    if next(iter(result), None) != "record" or not isinstance(result["record"], dict):
        return ["its first key is not `record`"]
    record, found = result["record"], []
    found += [f"record.{name} is missing (null where it is not known)" for name in FIELDS if name not in record]
    for name, value in record.items():
        kinds = {**FIELDS, **MORE}.get(name)
        if kinds is None:
            found.append(f"record.{name} is no field of a record; what was measured stands beside `record`")
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            found.append(f"record.{name} is {value!r}")
    if isinstance(record.get("date"), str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"]):
        found.append(f"record.date is {record['date']!r}, not YYYY-MM-DD")
    for commit in listed(record.get("commit")):
        if isinstance(commit, str) and not re.fullmatch(r"[0-9a-f]{7,40}", commit):
            found.append(f"record.commit holds {commit!r}, not a commit's hexadecimal name")
    if record.get("commit") is None and record.get("clean") is not None:
        found.append("record.clean is known and record.commit is not")
    if len(result) == 1:
        found.append("nothing was measured")
    return found


def write(path, result: dict) -> None:
    """Write a result, its `record` first. Raises ValueError for a record in another form."""
    result = {"record": result["record"], **result}
    if wrong := mistakes(result):
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    write_atomic(Path(path), json.dumps(result, indent=1, default=str) + "\n")


def read(path) -> dict:
    """Read a file of results."""
    return json.loads(Path(path).read_text(encoding="utf-8"))

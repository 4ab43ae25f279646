"""A run on several ranks, started by torchrun."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from launch.reproduce.tables.plan import Job
from launch.reproduce.tables.runs import Clock, write_record

FINAL_SECONDS = 600.0  # for the checkpoint


def train_on_ranks(job: Job, out: Path, launcher: list[str], clock: Clock) -> bool:
    """Train a run by a command to its end or to that of the clock, then write its record; returns whether complete."""
    if clock.over:
        return False
    child = subprocess.Popen([*launcher, *job.command(out)])
    try:
        child.wait(None if clock.end is None else max(0.0, clock.end - time.time()))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
        child.wait(FINAL_SECONDS)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    complete = child.returncode == 0 and not (job.folder(out) / "preempted").exists()
    if complete:
        write_record(job, out)
    return complete

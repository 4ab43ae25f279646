"""Runs of a table: several side by side, each continued where it was stopped, and the record of each finished one."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path

from launch.reproduce.tables.plan import Job
from maskwise.bench import record
from maskwise.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
LOCK_PATIENCE = 120.0  # seconds for the runs of a killed start to save their checkpoint
_orphaned = threading.Event()


class Clock:
    """The end of this call: seconds from now, or never."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.time() + seconds

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.end is not None and time.time() >= self.end


def side_by_side(tasks: Iterable[tuple[Callable, tuple]], processes: int, clock: Clock, threads: int) -> int:
    """Run (function, arguments) in processes of their own, each given `end=` as last; returns how many are unfinished.

    A function returns True when it has finished. After the end of the clock none is started. If this process is
    killed, its children save and end. processes = 0 runs all in this process.
    """
    waiting, unfinished = list(tasks), 0
    running: dict[Future, tuple] = {}
    if not processes:
        return sum(clock.over or not function(*arguments, end=clock.end) for function, arguments in waiting)
    if not waiting:
        return 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(waiting)), mp_context=context, initializer=follow_parent, initargs=(threads,)
    ) as pool:
        while waiting or running:
            while waiting and len(running) < processes and not clock.over:
                function, arguments = waiting.pop(0)
                running[pool.submit(function, *arguments, end=clock.end)] = arguments
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                unfinished += not done.result()
    return unfinished + len(waiting)


def follow_parent(threads: int) -> None:
    """Set up a process of the pool: its threads, and an end with a checkpoint when its parent is gone."""
    import torch

    torch.set_num_threads(threads)

    def watch() -> None:
        wait_for_end([multiprocessing.parent_process().sentinel])
        _orphaned.set()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def record_file(job: Job, out: Path) -> Path:
    """Return the file that says that a run is complete: its record."""
    return out / "records" / job.setting / job.row / f"seed{job.seed}.json"


def train(job: Job, out: Path, *, end: float | None = None) -> bool:
    """Train a run to its end or to the time `end`, then write its record; returns whether it is complete."""
    import maskwise
    from maskwise.engine.signals import StopSignals

    folder, command = job.folder(out), job.command(out)
    sys.argv = ["maskwise", *command]  # which the run records
    with StopSignals() as signals:
        timer = threading.Timer(max(0.0, end - time.time()), os.kill, (os.getpid(), signal.SIGTERM)) if end else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            wait_until_free(folder)
            status = "preempted" if signals.asked else maskwise.train(job.read(), out=folder, quiet=True)["status"]
        finally:
            if timer:
                timer.cancel()
    if status == "complete":
        write_record(job, out)
    if _orphaned.is_set():
        os._exit(1)  # the pool that waited for the result is gone
    return status == "complete"


def wait_until_free(folder: Path) -> None:
    """Wait while another process, of a start that was killed, is saving its checkpoint into the folder."""
    from maskwise.engine.run_lock import holder

    patience = time.monotonic() + LOCK_PATIENCE
    while (found := holder(folder)) is not None and found.alive and time.monotonic() < patience:
        time.sleep(0.2)


def write_record(job: Job, out: Path) -> None:
    """Write the record of a complete run: command, commit, hardware, seconds, steps, and the curve of its reports."""
    from launch.reproduce.record_run import training_record
    from maskwise.engine.run_log import read_metrics

    folder = job.folder(out)
    lines = read_metrics(folder / "metrics.jsonl")
    content = training_record(folder)
    content["record"]["command"] = " ".join(["maskwise", *command_words(job)])
    content["plan"] = plan_hash(job)
    name = "top1" if job.read().learns_labels else "knn"
    reports = [line for line in lines if line.get("report") == name]
    content["curve"] = [[line["step"], line["numbers"]["top1"]] for line in reports]
    content["baselines"] = baselines(folder)
    file = record_file(job, out)
    file.parent.mkdir(parents=True, exist_ok=True)
    record.write(file, content)


def command_words(job: Job) -> list[str]:
    """Return the words of a run's command without folders of the machine."""
    recipe = Path(job.recipe)
    shown = recipe.relative_to(ROOT).as_posix() if recipe.is_absolute() else job.recipe
    words = [re.sub(r"=/\S*/(?=\S)", "=", word) for word in job.command(Path("FOLDER"))]
    return [shown if word == job.recipe else word for word in words]


def baselines(folder: Path) -> dict[str, float]:
    """Return what the run measured before its first k-NN: untrained network, raw and whitened pixels; {} if nothing."""
    file = folder / "reports" / "baselines.json"
    return json.loads(file.read_text(encoding="utf-8"))["numbers"] if file.is_file() else {}


@functools.cache
def plan_hash(job: Job) -> str:
    """Return the hash of a run's recipe as planned, before it is fitted to the images."""
    return job.read().hash()


def finished(job: Job, out: Path) -> dict | None:
    """Return the record of a complete run, None of another. Raises UserError for a run of another plan."""
    file = record_file(job, out)
    if not file.is_file():
        return None
    stored = record.read(file)
    if stored["plan"] != plan_hash(job):
        raise UserError(f"{file} is of another recipe than {job.key} has now: choose another --out, or remove {out}")
    return stored


def learned(run: dict, points: float = 2.0) -> bool:
    """Return whether a run's k-NN ended that many points above its untrained network."""
    untrained = baseline(run, "untrained_pooled") or 0.0
    return bool(run["curve"]) and run["curve"][-1][1] >= untrained + points


def baseline(run: dict, row: str) -> float | None:
    """Return a baseline's k-NN by the name of its row, None where the run did not measure it."""
    return next((value for key, value in run["baselines"].items() if key.startswith(row)), None)


def total_seconds(runs: dict[str, dict]) -> float:
    """Return the seconds of training of all runs."""
    return sum(run["seconds_of_training"] for run in runs.values())

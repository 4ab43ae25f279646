"""Pace of a row: seconds, CPU seconds and floating-point operations of a step, from a few steps on real batches."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path

from launch.reproduce.tables.plan import Job
from maskwise.engine.atomic_file import write_atomic

TIMED = 4


def pace_file(job: Job, out: Path) -> Path:
    """Return the file of a row's pace."""
    return out / "pace" / job.setting / f"{job.row}.json"


def read_pace(job: Job, out: Path) -> dict | None:
    """Return the pace of a run's row, None if it was not measured."""
    file = pace_file(job, out)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def measure_pace(job: Job, out: Path, *, end: float | None = None) -> bool:
    """Time a few training steps of a row, loading included, after one whose operations are counted."""
    import torch

    from maskwise import build
    from maskwise.bench import parts
    from maskwise.bench.machine import wait
    from maskwise.distributed.world import World

    recipe = job.read("speed.workers=0")
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    trainer, data = build.trainer(recipe, world), build.dataset(recipe)
    batches = itertools.chain.from_iterable(
        build.stream(recipe, world, data, trainer.total_steps, 0) for _ in range(TIMED + 2)
    )
    augment = build.inputs(recipe, trainer)

    def step() -> None:
        batch = next(batches)
        trainer.step(*augment(batch.to(world.device)), sample_ids=batch.index)

    step()
    flops = parts.count(step)["flops"]
    wait(world.device)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for _ in range(TIMED):
        step()
    wait(world.device)
    found = {
        "steps": trainer.total_steps,
        "seconds_per_step": (time.perf_counter() - begin) / TIMED,
        "cpu_seconds_per_step": (time.process_time() - begin_cpu) / TIMED,
        "flops_per_step": flops,
    }
    file = pace_file(job, out)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(found, indent=1) + "\n")
    return True


def hours_left(jobs: Iterable[Job], out: Path, processes: int) -> float:
    """Return the estimated hours of training of these runs, side by side; evaluations are not counted."""
    paces = [read_pace(job, out) for job in jobs]
    return sum(pace["steps"] * pace["seconds_per_step"] for pace in paces if pace) / processes / 3600

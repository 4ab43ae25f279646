"""Weak scaling of 1, 2 and 4 ranks on this machine: every rank has the same batch and one core, over loopback.

More ranks than cores share them: then CPU seconds count, and wall times do not. Communication runs in gloo's threads
on the core of its rank, so that its CPU seconds are those of the process beyond a single rank's.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

WARM = 2  # steps before the timed ones
LOOPBACK = Path("/proc/net/dev")


def loopback_bytes() -> int | None:
    """Return the bytes sent over loopback by all programs since the machine started; None where it is not known."""
    if not LOOPBACK.is_file():
        return None
    for line in LOOPBACK.read_text(encoding="utf-8").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return None


def usable_cores() -> list[int]:
    """Return the cores to which ranks can be pinned; none where the system does not pin."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def start(ranks: int, words: list[str], steps: int, batch: int) -> list[dict]:
    """Run ranks pinned to the cores in turn; returns what each prints. Raises RuntimeError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "launch.reproduce.growth", "rank", *words]
    command += ["--steps", str(steps), "--batch", str(batch)]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{ranks} ranks ended with {[process.returncode for process in processes]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def run_rank(words: list[str], steps: int, batch: int) -> dict:
    """Train one rank on random crops; returns its times per step, its traffic, and the formula's."""
    from launch.reproduce.growth.collectives import CollectiveCounter
    from launch.reproduce.growth.traffic import as_rows, step_traffic, wire_bytes
    from maskwise import build
    from maskwise.bench.implementation import random_crops
    from maskwise.distributed.world import World
    from maskwise.recipe.reading import read_recipe

    cores = usable_cores()
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    world = World.start("cpu")
    recipe = read_recipe(*words, f"train.batch_size={batch * world.size}", "evaluate.knn_every=0", try_model=False)
    trainer = build.trainer(recipe, world, images=1000 * batch * world.size, precision="fp32")
    alone = read_recipe(*words, f"train.batch_size={batch}", "evaluate.knn_every=0", try_model=False)
    crops = random_crops(alone, world.device)

    clock = Clock(trainer.method)
    for _ in range(WARM):
        trainer.step(*crops)
    world.barrier()
    before, rows = loopback_bytes(), []
    for _ in range(steps):
        clock.start()
        trainer.step(*crops)
        rows.append(clock.stop())
    world.barrier()
    sent = None if before is None else (loopback_bytes() - before) / steps / world.size
    with CollectiveCounter() as counter:
        trainer.step(*crops)
    formula = step_traffic(recipe, trainer.method, world.size)
    world.close()
    return {
        "steps": rows,
        "loopback_bytes": sent,
        "counted": as_rows(counter.traffic()),
        "formula": as_rows(formula),
        "payload_bytes": sum(volume.bytes for volume in formula.values()),
        "ring_bytes": wire_bytes(formula),
    }


class Clock:
    """Times of a step: wall and CPU seconds, and the wall seconds in which it waits for collectives.

    `gradients_wait` lasts from the last gradient to the end of the backward pass, `others_wait` is that of all-reduces
    called outside it.
    """

    def __init__(self, method):
        self.ready = self.gradients = self.others = 0.0
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.note)
        self.backward, self.all_reduce = torch.Tensor.backward, dist.all_reduce
        torch.Tensor.backward = lambda loss, *arguments, **options: self.timed_backward(loss, *arguments, **options)
        dist.all_reduce = self.timed_all_reduce

    def note(self, parameter) -> None:
        """Note the time at which a gradient is ready."""
        self.ready = time.perf_counter()

    def timed_backward(self, *arguments, **options) -> None:
        """Run the backward pass and add its time after the last gradient."""
        self.backward(*arguments, **options)
        self.gradients += time.perf_counter() - self.ready

    def timed_all_reduce(self, *arguments, **options):
        """Call the all-reduce and add its time."""
        begin = time.perf_counter()
        result = self.all_reduce(*arguments, **options)
        self.others += time.perf_counter() - begin
        return result

    def start(self) -> None:
        """Begin a step."""
        self.gradients = self.others = 0.0
        self.begin = time.perf_counter(), time.process_time(), time.thread_time()

    def stop(self) -> dict[str, float]:
        """Return the seconds of the step."""
        now = time.perf_counter(), time.process_time(), time.thread_time()
        wall, process, thread = (end - begin for end, begin in zip(now, self.begin))
        return {
            "wall": wall,
            "cpu": process,
            "main_thread_cpu": thread,
            "gradients_wait": self.gradients,
            "others_wait": self.others,
        }


def measure(words: list[str], sizes: list[int], steps: int, batch: int, turns: int) -> dict:
    """Measure every number of ranks in turns, forward and back; returns the medians and all steps."""
    runs: dict[int, list[list[dict]]] = {ranks: [] for ranks in sizes}
    for turn in range(turns):
        for ranks in sizes if turn % 2 == 0 else reversed(sizes):
            runs[ranks].append(start(ranks, words, steps, batch))
            print(f"{ranks} ranks, turn {turn + 1} of {turns}: done", file=sys.stderr)
    cores = len(usable_cores())
    result = {str(ranks): summary(runs[ranks], ranks <= cores) for ranks in sizes}
    first = result[str(sizes[0])]
    for row in result.values():
        row["cpu_efficiency"] = first["cpu"] / row["cpu"]
        row["efficiency"] = first["wall"] / row["wall"] if row["own_cores"] else None
    return {"cores": cores, "ranks": result}


def summary(turns: list[list[dict]], own_cores: bool) -> dict:
    """Return medians over the steps of all ranks and turns, with the spread of the wall time."""
    reports = [report for turn in turns for report in turn]
    rows = [row for report in reports for row in report["steps"]]
    sent = [report["loopback_bytes"] for report in reports if report["loopback_bytes"] is not None]
    first = reports[0]
    walls = [row["wall"] for row in rows]
    return {
        "own_cores": own_cores,
        **{key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "wall_lowest": min(walls),
        "wall_highest": max(walls),
        "steps": len(rows),
        "payload_bytes": first["payload_bytes"],
        "ring_bytes": first["ring_bytes"],
        "loopback_bytes": statistics.median(sent) if sent else None,
        "counted_equals_formula": all(report["counted"] == report["formula"] for report in reports),
        "traffic": first["counted"],
        "all_steps": rows,
    }

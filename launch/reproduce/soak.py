"""Monitor a long run from outside: `python -m launch.reproduce.soak --minutes 30 --steps 20000 --json FILE`.

One process trains a network of a few thousand weights, with checkpoints, k-NN and pictures at intervals, until both the
minutes and the steps are over; then Ctrl-C ends it. Its memory, file handles, threads and children are read from /proc.
Then runs with data workers and with two ranks are interrupted by Ctrl-C, and the processes and shared memory that
remain are counted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from maskwise.bench import record

MIB = 1 << 20
SHARED = Path("/dev/shm")
TINY = (
    "data.size=36",
    "data.count=64",
    "crops.local_number=0",
    "crops.jitter_prob=0",
    "crops.gray_prob=0",
    "crops.blur_prob=[0,0,0]",
    "crops.solarize_prob=0",
    "backbone.patch_size=16",
    "backbone.embed_dim=32",
    "backbone.num_heads=2",
    "backbone.depth=1",
    "backbone.drop_path=0",
    "pooling.name=simpool",
    "method.name=dino",
    "masking.name=attmask_high",
    "train.batch_size=4",
    "train.log_every=50",
    "train.save_every=2000",
    "evaluate.knn_every=100",
    "evaluate.pictures_every=200",
    "optimizer.warmup_epochs=1",
    "teacher.warmup_temp_epochs=0",
    "speed.checkpointing=none",
)
FLAT = 0.02  # relative growth of the resident memory over the second half of the run that counts as none


def command(folder: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """Return the command of a tiny run without an end."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    return [
        sys.executable,
        "-m",
        *torchrun,
        "maskwise",
        "train",
        "debug/tiny",
        "--out",
        str(folder),
        "train.steps=100000000",
        *TINY,
        *overrides,
    ]


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            parents.setdefault(int(words[1]), []).append(int(path.parent.name))
    pids, waiting = [], [pid]
    while waiting:
        below = parents.get(waiting.pop(), [])
        pids += below
        waiting += below
    return pids


def shared_memory() -> set[str]:
    """Return the names under /dev/shm."""
    return {path.name for path in SHARED.iterdir()} if SHARED.is_dir() else set()


def sample(pid: int) -> dict:
    """Return memory (MiB), file handles, threads and descendants of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
    return {
        "rss_mib": round(int(status["VmRSS"].split()[0]) / 1024, 2),
        "handles": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "children": len(descendants(pid)),
    }


def last_step(folder: Path) -> int:
    """Return the last logged step of a run."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode().splitlines()
        return max((json.loads(line)["step"] for line in lines[1:-1] if line.startswith("{")), default=0)
    except (OSError, ValueError):
        return 0


def started(folder: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen:
    """Start a tiny run in its own process group; its output goes to a .log file next to the run folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = open(folder.parent / f"{folder.name}.log", "w", encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.Popen(
        command(folder, *overrides, ranks=ranks), stdout=log, stderr=log, start_new_session=True, env=environment
    )


def wait_for(run: subprocess.Popen, folder: Path, step: int, seconds: float = 600) -> None:
    """Wait until a run has logged a step; raise RuntimeError with its last output if it ends or stalls before."""
    deadline = time.monotonic() + seconds
    while last_step(folder) < step:
        if run.poll() is not None or time.monotonic() > deadline:
            log = (folder.parent / f"{folder.name}.log").read_text(encoding="utf-8")
            raise RuntimeError(f"the run did not reach step {step}: {log[-2000:]}")
        time.sleep(0.2)


def ended(run: subprocess.Popen, seconds: float = 120) -> dict:
    """End a run as Ctrl-C does, and count the processes and shared-memory names that remain."""
    family = [run.pid, *descendants(run.pid)]
    os.killpg(run.pid, signal.SIGINT)
    code = run.wait(timeout=seconds)
    deadline = time.monotonic() + 10  # the kernel may still be cleaning up
    while (left := [pid for pid in family if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {
        "exit": code,
        "processes": len(family),
        "processes_left": len(left),
        "shared_memory_left": sorted(shared_memory() & family_names(family)),
    }


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def family_names(family: list[int]) -> set[str]:
    """Return the shared-memory names with one of these process ids."""
    return {name for name in shared_memory() if any(f"_{pid}_" in name for pid in family)}


def interrupted(folder: Path, *overrides: str, ranks: int = 1, at: int = 40) -> dict:
    """Interrupt a run by Ctrl-C once it has logged step `at`."""
    before = shared_memory()
    run = started(folder, "train.log_every=10", *overrides, ranks=ranks)
    wait_for(run, folder, at)
    status = ended(run)
    return {**status, "new_shared_memory": len(shared_memory() - before), "preempted": (folder / "preempted").is_file()}


def slope(samples: list[dict], key: str, by: str) -> float:
    """Return the least-squares slope of `key` over `by`."""
    xs, ys = [sample[by] for sample in samples], [sample[key] for sample in samples]
    middle, level = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    return sum((x - middle) * (y - level) for x, y in zip(xs, ys)) / spread if spread else 0.0


def verdict(samples: list[dict]) -> dict:
    """Return whether memory and handles were constant over the second half of the samples, with the numbers."""
    half = samples[len(samples) // 2 :]
    per_step = slope(half, "rss_mib", "step")
    grown = per_step * (half[-1]["step"] - half[0]["step"])
    handles = slope(half, "handles", "step") * (half[-1]["step"] - half[0]["step"])
    return {
        "rss_mib_per_1000_steps": round(1000 * per_step, 4),
        "rss_mib_grown_in_second_half": round(grown, 2),
        "rss_mib_most": max(sample["rss_mib"] for sample in samples),
        "handles_grown_in_second_half": round(handles, 2),
        "handles_most": max(sample["handles"] for sample in samples),
        "flat": grown < FLAT * half[0]["rss_mib"] and handles < 1,
    }


def soak(minutes: float, steps: int, folder: Path, every: float = 15.0, say=print) -> dict:
    """Train until both are over, with a sample every `every` seconds; then Ctrl-C."""
    run = started(folder / "soak")
    begin, samples = time.monotonic(), []
    try:
        wait_for(run, folder / "soak", 1)
        while not samples or samples[-1]["seconds"] < 60 * minutes or samples[-1]["step"] < steps:
            time.sleep(every)
            if run.poll() is not None:
                raise RuntimeError(
                    f"the run ended by itself: {(folder / 'soak.log').read_text(encoding='utf-8')[-2000:]}"
                )
            samples.append(
                {"seconds": round(time.monotonic() - begin), "step": last_step(folder / "soak"), **sample(run.pid)}
            )
            say(json.dumps(samples[-1]))
        end = ended(run)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    return {"samples": samples, "verdict": verdict(samples), "end": end}


def measure(minutes: float, steps: int, every: float = 15.0, say=print) -> dict:
    """Run the soak, then the interruptions; record the machine."""
    about = {"record": record.describe(seed=0), "recipe": ["debug/tiny", *TINY]}
    with tempfile.TemporaryDirectory() as folder:
        result = soak(minutes, steps, Path(folder), every, say)
        result["interrupted"] = {
            "two data workers": interrupted(Path(folder) / "workers", "speed.workers=2"),
            "two ranks": interrupted(Path(folder) / "ranks", ranks=2),
            "two ranks with two data workers each": interrupted(Path(folder) / "both", "speed.workers=2", ranks=2),
        }
    return {**about, **result}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between samples")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    result = measure(given.minutes, given.steps, given.every)
    if given.json:
        record.write(given.json, result)
    print(json.dumps({key: result[key] for key in ("verdict", "end", "interrupted")}, indent=1))

"""Compare poolings on real images: `python -m launch.reproduce.pooling_table --packs FOLDER --out FILE.json`.

Packs are cifar10-jpeg-small and imagenette224-core, with --profile gpu tinyimagenet100; they are unpacked into --work.
Every pooling is trained by the library's own loop from a recipe in this folder, three seeds each; only pooling and seed
differ. --profile map does so for the steps from average pooling to MAP. All poolings run with one seed before the next.
Each finished run is written to the JSON at once, and the same command continues after an interruption. After --minutes
no further run starts. --processes sets the number of parallel runs, one thread each. Then, or with --report alone, a
table (.md) and a plot (.png) are written next to the JSON. --miniature does all that with a few steps, to test the
script.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from launch.reproduce.packs import unpack
from launch.reproduce.pooling_experiments import PARTS, PROFILES, SMALL
from launch.reproduce.pooling_report import report

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """One run: an experiment's row and seed."""

    experiment: str
    row: str
    seed: int
    recipe: str
    words: tuple[str, ...]
    report: str
    part: str

    @property
    def key(self) -> str:
        """Name of its result in the JSON."""
        return f"{self.experiment}/{self.row}/{self.seed}"


def tasks(
    profile: str,
    packs: dict[str, Path],
    seeds: int | None = None,
    rows: tuple[str, ...] | None = None,
    miniature: bool = False,
) -> Iterator[Task]:
    """Yield the runs of a profile: one seed of every experiment and row, then the next seed."""
    for seed in range(3 if seeds is None else seeds):
        for name, experiment in PROFILES[profile].items():
            for row, own in experiment.rows.items():
                if seed in experiment.seeds and (rows is None or row in rows):
                    small = SMALL[experiment.recipe] if miniature else ()
                    words = (
                        "data.name=launch.reproduce.decoded_folder:DecodedFolder",
                        f"data.path={packs[experiment.pack]}",
                        f"seed={seed}",
                        *own,
                        *experiment.words,
                        *small,
                    )
                    recipe = str(HERE / f"{experiment.recipe}.yaml")
                    yield Task(name, row, seed, recipe, words, experiment.report, experiment.part)


def run(task: Task, work: str) -> dict:
    """Train in a folder that an interrupted run is continued from -> the run's entry in the JSON."""
    import torch

    import maskwise
    from maskwise.engine.run_log import read_metrics
    from maskwise.recipe.reading import read_recipe

    # for the recipes that runs leave in their folders
    os.environ["MASKWISE_MODULES"] = "launch.reproduce.decoded_folder"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe, folder = read_recipe(task.recipe, *task.words), Path(work) / task.key.replace("/", "-")
    begin = time.perf_counter()
    maskwise.train(recipe, out=folder, quiet=True)
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    line = {
        "numbers": next(line["numbers"] for line in reversed(lines) if line.get("report") == task.report),
        "loss": steps[-1]["loss"],
        "steps": steps[-1]["step"],
        f"{task.part}_parameters": weights(folder, PARTS[task.part]),
        "seconds": round(time.perf_counter() - begin, 1),
        "batch_size": recipe.train.batch_size,
        "recipe_hash": recipe.hash(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    shutil.rmtree(folder)
    return line


def weights(folder: Path, part: str) -> int:
    """Count the learned numbers that a run's last checkpoint has under a name."""
    from safetensors import safe_open

    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text(encoding="utf-8").strip()
    with safe_open(last / "model.safetensors", "np") as file:
        names = [
            name
            for name in file.keys()  # noqa: SIM118 (no mapping)
            if name.startswith(part) and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        ]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def measure(
    todo: list[Task], out: Path, work: Path, processes: int, minutes: float | None, profile: str = "cpu"
) -> int:
    """Run what the JSON lacks, `processes` at a time; each result is stored at once. Return how many are left."""
    results = started(out, profile)
    waiting = [task for task in todo if task.key not in results["runs"]]
    begin = time.monotonic()
    before = results.get("minutes", 0.0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running: dict = {}
        while waiting or running:
            while waiting and len(running) < processes and (minutes is None or time.monotonic() - begin < 60 * minutes):
                task = waiting.pop(0)
                running[pool.submit(run, task, str(work))] = task
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(done)
                results["runs"][task.key] = done.result()
                results |= {"minutes": round(before + (time.monotonic() - begin) / 60, 1), "processes": processes}
                store(results, out)
                numbers = results["runs"][task.key]["numbers"]
                seconds = results["runs"][task.key]["seconds"]
                print(
                    f"{task.key:<28} {next(iter(numbers.values())):6.2f}  {seconds:6.1f} s  {len(waiting)} left",
                    flush=True,
                )
    return len(waiting)


def started(out: Path, profile: str) -> dict:
    """Return what was measured before, with a record that includes this start, or an empty result."""
    import torch

    from maskwise.bench import record

    command = f"python -m launch.reproduce.pooling_table --profile {profile}"
    about = record.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"), [0, 1, 2], command)
    if not out.is_file():
        return {"record": about, "runs": {}}
    stored = record.read(out)
    return {**stored, "record": record.continued(stored["record"], about)}


def store(results: dict, out: Path) -> None:
    """Replace the JSON file."""
    from maskwise.bench import record

    record.write(out, results)


def main(words: list[str] | None = None) -> int:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, help="the folder of the .tar.xz packs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; table and plot are written next to it")
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument(
        "--processes", type=int, default=1, help="runs side by side, one thread each (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="start no run after that time (default: run all)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: all three)")
    parser.add_argument("--rows", help="only these, such as gap,simpool")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "maskwise-pooling-table",
        help="folder of packs and unfinished runs (default: %(default)s)",
    )
    parser.add_argument("--miniature", action="store_true", help="two steps of a tiny network each")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    given = parser.parse_args(words)
    left = 0
    if not given.report:
        if given.packs is None:
            parser.error("give --packs FOLDER, or --report for what is measured already")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        chosen = tuple(given.rows.split(",")) if given.rows else None
        packs = {
            experiment.pack: unpack(given.packs / f"{experiment.pack}.tar.xz", given.work).resolve()
            for experiment in PROFILES[given.profile].values()
        }
        todo = list(tasks(given.profile, packs, given.seeds, chosen, given.miniature))
        left = measure(todo, given.out, given.work, given.processes, given.minutes, given.profile)
    if given.out.is_file():
        report(json.loads(given.out.read_text(encoding="utf-8")), given.out, given.profile)
    print(
        f"{given.out.with_suffix('.md')}: " + (f"{left} runs left; the same command continues" if left else "complete")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

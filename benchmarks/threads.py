"""What the number of CPU threads changes in a run: `python -m benchmarks.threads --json docs/results/threads.json`.

The first steps of the quickstart with one thread, with one again, and with two; how far the losses and the weights lie apart.
"""

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file

from maskwise import build
from maskwise.engine.journal import read_metrics
from maskwise.recipe import read_recipe
from maskwise.run_record import commit

RECIPE = ("pretrain/quickstart_shapes", "data.count=64", "train.batch_size=16", "train.log_every=1", "evaluate.knn_every=0", "evaluate.pictures_every=0", "optimizer.warmup_epochs=0")


def outcome(folder: Path, threads: int, steps: int) -> tuple[list[float], dict]:
    """The loss of each step, and the student's last weights."""
    build.train(read_recipe(*RECIPE, f"train.steps={steps}", f"speed.threads={threads}"), folder, quiet=True)
    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text().strip()
    weights = {key: value for key, value in load_file(last / "model.safetensors").items() if key.startswith("student.")}
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line], weights


def apart(one, other) -> dict:
    """The largest relative difference of a loss, at the first step and at any, and of the weights as a whole."""
    losses = [abs(a - b) / abs(a) for a, b in zip(one[0], other[0])]
    distance = sum(float((one[1][key] - other[1][key]).double().square().sum()) for key in one[1]) ** 0.5
    length = sum(float(value.double().square().sum()) for value in one[1].values()) ** 0.5
    return {"first_loss": losses[0], "any_loss": max(losses), "weights": distance / length}


def measure(steps: int) -> dict:
    """Three runs compared."""
    with tempfile.TemporaryDirectory() as folder:
        one, again, two = (outcome(Path(folder) / name, threads, steps) for name, threads in (("one", 1), ("again", 1), ("two", 2)))
    return {
        "date": str(date.today()), "commit": commit(), "command": "python -m benchmarks.threads", "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "torch": torch.__version__, "recipe": RECIPE, "steps": steps, "one_thread_twice": apart(one, again), "one_and_two_threads": apart(one, two),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    result = measure(given.steps)
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))

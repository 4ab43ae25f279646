"""Measure how the number of CPU threads changes a run: `python -m launch.reproduce.threads --json FILE`.

Trains the first steps of the quickstart with one thread, with one again, and with two, and compares losses and weights.
"""

import argparse
import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from maskwise import build
from maskwise.bench import record
from maskwise.engine.run_log import read_metrics
from maskwise.recipe.reading import read_recipe

RECIPE = (
    "pretrain/quickstart_shapes",
    "data.count=64",
    "train.batch_size=16",
    "train.log_every=1",
    "evaluate.knn_every=0",
    "evaluate.pictures_every=0",
    "optimizer.warmup_epochs=0",
)


def outcome(folder: Path, threads: int, steps: int) -> tuple[list[float], dict]:
    """Return the loss of each step and the student's final weights."""
    build.train(read_recipe(*RECIPE, f"train.steps={steps}", f"speed.threads={threads}"), folder, quiet=True)
    last = folder / "checkpoints" / (folder / "checkpoints" / "last").read_text(encoding="utf-8").strip()
    weights = {key: value for key, value in load_file(last / "model.safetensors").items() if key.startswith("student.")}
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line], weights


def difference(one, other) -> dict:
    """Largest relative difference of the losses, at the first step and at any, and of all weights."""
    losses = [abs(a - b) / abs(a) for a, b in zip(one[0], other[0])]
    distance = sum(float((one[1][key] - other[1][key]).double().square().sum()) for key in one[1]) ** 0.5
    length = sum(float(value.double().square().sum()) for value in one[1].values()) ** 0.5
    return {"first_loss": losses[0], "any_loss": max(losses), "weights": distance / length}


def measure(steps: int) -> dict:
    """Train three runs and compare them."""
    about = record.describe(seed=read_recipe(*RECIPE).seed)
    with tempfile.TemporaryDirectory() as folder:
        one, again, two = (
            outcome(Path(folder) / name, threads, steps) for name, threads in (("one", 1), ("again", 1), ("two", 2))
        )
    return {
        "record": {**about, "threads": [1, 2]},
        "recipe": RECIPE,
        "steps": steps,
        "one_thread_twice": difference(one, again),
        "one_and_two_threads": difference(one, two),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    result = measure(given.steps)
    if given.json:
        record.write(given.json, result)
    print(json.dumps(result, indent=1))

"""Compare distillation with training the student alone at equal time: k-NN of both, of the teacher and of baselines.

python -m launch.reproduce.distill TEACHER DISTILL ALONE --minutes 30 --out FOLDER --json docs/results/distill.json \
    data.path=photos [key=value ...]

TEACHER is a model that `maskwise evaluate` reads, DISTILL a recipe of method distill, ALONE a recipe that trains the
same backbone without a teacher. Overrides go to both. Each is timed for a few steps, and then trained for as many as
fit into the minutes, one after the other on one process; the seconds of training that they took are in the JSON.
Runs that are complete in FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import maskwise
from maskwise import build
from maskwise.bench import record
from maskwise.build.baselines import with_test
from maskwise.build.distillation import frozen_teacher
from maskwise.engine.run_log import read_metrics
from maskwise.evaluation.baselines import baselines
from maskwise.evaluation.knn import knn

K = 20
TIMED = 12  # steps, of which the first half is not counted
QUIET = ("evaluate.knn_every=0", "evaluate.pictures_every=0", "train.log_every=1")


def lines(folder: Path) -> list[dict]:
    """Return the logged steps of a run."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def seconds_per_step(recipe: str, overrides: list[str], folder: Path) -> float:
    """Return the seconds of a training step, from a short run."""
    maskwise.train(maskwise.read_recipe(recipe, *overrides, *QUIET, f"train.steps={TIMED}"), out=folder, quiet=True)
    steps = lines(folder)
    middle, last = steps[len(steps) // 2], steps[-1]
    return (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])


def trained(name: str, recipe: str, overrides: list[str], minutes: float, out: Path) -> dict:
    """Train a recipe for that many minutes; returns its settings, steps, seconds and the recipe."""
    pace = seconds_per_step(recipe, overrides, out / f"timed_{name}")
    folder = out / name
    done = folder / "recipe.yaml"  # an earlier start of this script chose the steps
    steps = maskwise.read_recipe(folder).train.steps if done.is_file() else max(1, round(60 * minutes / pace))
    resolved = maskwise.read_recipe(recipe, *overrides, f"train.steps={steps}", "evaluate.knn_every=0")
    result = maskwise.train(resolved, out=folder)
    if result["status"] != "complete":
        sys.exit("stopped: the same command goes on")
    last = lines(folder)[-1]
    settings = {"recipe": recipe, "recipe_hash": resolved.hash(), "steps": steps, "seconds_per_step": pace}
    return {**settings, "seconds_of_training": last["seconds"], "loss": last["loss"]}


def main(words: list[str] | None = None) -> int:
    """Train both, evaluate all, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("distill")
    parser.add_argument("alone")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_intermixed_args(words)
    model = f"method.model={given.teacher}"
    runs = {
        "distill": trained("distill", given.distill, [*given.overrides, model], given.minutes, given.out),
        "alone": trained("alone", given.alone, given.overrides, given.minutes, given.out),
    }
    recipe = maskwise.read_recipe(given.out / "alone")
    data = with_test(build.dataset(recipe), build.dataset(recipe, "test"))
    encoders = {name: maskwise.load(given.out / name) for name in runs}
    encoders["teacher"] = frozen_teacher(given.teacher, recipe.seed)
    top1 = {name: knn(encoder, data, k=K).numbers[f"pooled_top1_k{K}"] for name, encoder in encoders.items()}
    before = baselines(data, untrained=build.encoder(recipe), k=K).numbers
    top1 |= {
        "untrained": before[f"untrained_pooled_top1_k{K}"],
        "pixels": before[f"pixels_top1_k{K}"],
        "whitened_pixels": before[f"whitened_pixels_top1_k{K}"],
    }
    parameters = {name: sum(p.numel() for p in encoder.parameters()) for name, encoder in encoders.items()}
    about = record.describe(seed=recipe.seed)
    record.write(
        given.json,
        {
            "record": about,
            "minutes": given.minutes,
            "overrides": given.overrides,
            "images": {role: len(part) for role, part in data.items()},
            "runs": runs,
            "parameters": parameters,
            f"knn_top1_k{K}": top1,
        },
    )
    print(json.dumps({f"knn_top1_k{K}": top1, "seconds": {n: r["seconds_of_training"] for n, r in runs.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

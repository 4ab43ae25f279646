"""Record a finished run: `python -m launch.reproduce.record_run RUN docs/results/NAME.json`.

Curve and seconds come from the run folder; k-NN (k = 20) of the teacher and its baselines (untrained network, raw and
whitened pixels) are measured on all labeled images of the recipe's data. For a supervised run the curve is top-1; with
MAP, top-1 of the light form is measured too. The numbers of `maskwise report RUN --measure` are taken over if it
was run before.
"""

import functools
import json
import platform
import sys
from pathlib import Path

import maskwise
from maskwise import build
from maskwise.bench import record
from maskwise.engine.run_log import read_metrics
from maskwise.evaluation.baselines import baselines
from maskwise.evaluation.knn import knn
from maskwise.recipe.reading import read_recipe

K = 20
FEATURES = ("pooled", "patch_mean")


def curve(lines: list[dict]) -> list[dict]:
    """Return the k-NN reports of a run with the losses logged before them."""
    points, last = [], {}
    for line in lines:
        if line.get("report") == "knn":
            numbers = line["numbers"]
            points.append(
                {
                    "step": line["step"],
                    **last,
                    "pooled": numbers["pooled_top1_k20"],
                    "patch_mean": numbers["patch_mean_top1_k20"],
                }
            )
        elif "loss" in line:
            last = {
                key: round(line[key], 4)
                for key in ("loss", "cls", "patch", "teacher_entropy", "seconds")
                if key in line
            }
    return points


def top1_curve(lines: list[dict]) -> list[dict]:
    """Return the top-1 reports of a supervised run with the losses logged before them."""
    points, last = [], {}
    for line in lines:
        if line.get("report") == "top1":
            points.append(
                {"step": line["step"], **last, **{name: round(value, 4) for name, value in line["numbers"].items()}}
            )
        elif "loss" in line:
            last = {key: round(line[key], 4) for key in ("loss", "seconds")}
    return points


def features(folder: Path, recipe, lines: list[dict]) -> dict:
    """Return counts of images, k-NN of the teacher and its baselines, and the curve."""
    data = build.dataset(recipe)
    data = {"train": data, "test": build.labeled_test(recipe, data)}
    trained = knn(maskwise.load(folder), data, k=K)
    before = baselines(data, untrained=build.encoder(recipe), k=K)
    return {
        "images": {role: len(images) for role, images in data.items()},
        f"knn_top1_k{K}": {
            "teacher": {name: trained.numbers[f"{name}_top1_k{K}"] for name in FEATURES},
            "untrained": {name: before.numbers[f"untrained_{name}_top1_k{K}"] for name in FEATURES},
            "pixels": before.numbers[f"pixels_top1_k{K}"],
            "pixels_side": before.protocol["pixels"],
            "whitened_pixels": before.numbers[f"whitened_pixels_top1_k{K}"],
            "whitened_pixels_dims": before.protocol["whitened_pixels"]["dims"],
        },
        "curve": curve(lines),
        **report(folder),
    }


def report(folder: Path) -> dict:
    """Return numbers and protocol of `maskwise report`, {} where the run has none."""
    file = folder / "reports" / "run_report.json"
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {"report": {key: stored[key] for key in ("numbers", "protocol", "data_hash")}}


def labels(folder: Path, recipe, lines: list[dict]) -> dict:
    """Return counts of images, final top-1 and the curve."""
    data = build.dataset(recipe)
    reports = top1_curve(lines)
    light = (
        {"light_top1": maskwise.evaluate("top1", str(folder), light=True).numbers["top1"]}
        if recipe.classifier.name == "map"
        else {}
    )
    images = {"train": len(data), "test": len(build.labeled_test(recipe, data))}
    return {"images": images, "top1": reports[-1]["top1"], **light, "curve": reports}


def training_record(folder: Path) -> dict:
    """Return record, recipe hash, precision, seconds, steps and batch size of a run's training."""
    recipe, run = read_recipe(folder / "recipe.yaml"), json.loads((folder / "run.json").read_text(encoding="utf-8"))
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    starts = [
        {
            "command": record.without_folders(run["command"]),
            **record.checkout(start["commit"]),
            "date": start["started"].partition("T")[0],
            "seed": recipe.seed,
            "hardware": start["device"],
            "threads": start["threads"],
            "torch": start["versions"]["torch"],
            "python": start["versions"]["python"],
            "platform": platform.machine(),
        }
        for start in run["starts"]
    ]
    return {
        "record": functools.reduce(record.continued, starts),
        "recipe_hash": run["recipe_hash"],
        "precision": run["precision"],
        "seconds_of_training": steps[-1]["seconds"],
        "steps": steps[-1]["step"],
        "batch_size": recipe.train.batch_size,
    }


def recorded(folder: Path) -> dict:
    """Return the result of a run; its record is that of the training, not of this script."""
    recipe, lines = read_recipe(folder / "recipe.yaml"), read_metrics(folder / "metrics.jsonl")
    return {**training_record(folder), **(labels if recipe.learns_labels else features)(folder, recipe, lines)}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    result = recorded(Path(sys.argv[1]))
    record.write(sys.argv[2], result)
    print(json.dumps({key: value for key, value in result.items() if "top1" in key}, indent=1))

"""Write down a finished run: `python benchmarks/record_run.py RUN docs/results/NAME.json`.

The curve and the seconds come from the run folder; k-NN (k = 20) of the teacher, of the untrained network and of raw normalised
pixels are measured anew on all labelled images of the recipe's data. Of a supervised run the curve is that of top-1, and of one with MAP
top-1 of its light form is measured anew.
"""

import json
import platform
import re
import sys
from datetime import date
from pathlib import Path

import maskwise
from maskwise import build
from maskwise.evaluation.knn import knn
from maskwise.recipe import read_recipe


def curve(lines: list[dict]) -> list[dict]:
    """The k-NN reports of a run with the losses of the log lines before them."""
    found, last = [], {}
    for line in lines:
        if line.get("report") == "knn":
            numbers = line["numbers"]
            found.append({"step": line["step"], **last, "pooled": numbers["pooled_top1_k20"], "patch_mean": numbers["patch_mean_top1_k20"]})
        elif "loss" in line:
            last = {key: round(line[key], 4) for key in ("loss", "cls", "patch", "teacher_entropy", "seconds")}
    return found


def accuracies(lines: list[dict]) -> list[dict]:
    """The top-1 reports of a supervised run with the losses of the log lines before them."""
    found, last = [], {}
    for line in lines:
        if line.get("report") == "top1":
            found.append({"step": line["step"], **last, **{name: round(value, 4) for name, value in line["numbers"].items()}})
        elif "loss" in line:
            last = {key: round(line[key], 4) for key in ("loss", "seconds")}
    return found


def features(folder: Path, recipe, lines: list[dict]) -> dict:
    """How many images there are, k-NN of the teacher and of what it must beat, and the curve."""
    data = build.dataset(recipe)
    data = {"train": data, "test": build.labelled_test(recipe, data)}
    teacher, untrained = maskwise.load(folder), build.encoder(recipe)
    about = {"k": 20, "pixels": min(96, int(teacher.image_size[0]))}
    trained, before = knn(teacher, data, **about), knn(untrained, data, k=20)
    return {
        "images": {role: len(images) for role, images in data.items()},
        "knn_top1_k20": {
            "teacher": {name: trained.numbers[f"{name}_top1_k20"] for name in ("pooled", "patch_mean")},
            "untrained": {name: before.numbers[f"{name}_top1_k20"] for name in ("pooled", "patch_mean")},
            "pixels": trained.numbers["pixels_top1_k20"],
        },
        "curve": curve(lines),
    }


def labels(folder: Path, recipe, lines: list[dict]) -> dict:
    """How many images there are, top-1 at the end and along the way."""
    data = build.dataset(recipe)
    reports = accuracies(lines)
    light = {"light_top1": maskwise.evaluate("top1", str(folder), light=True).numbers["top1"]} if recipe.classifier.name == "map" else {}
    images = {"train": len(data), "test": len(build.labelled_test(recipe, data))}
    return {"images": images, "top1": reports[-1]["top1"], **light, "curve": reports}


def record(folder: Path) -> dict:
    """Everything worth keeping of one run, without paths of the machine."""
    recipe, run = read_recipe(folder / "recipe.yaml"), json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        "recipe_hash": run["recipe_hash"],
        "date": str(date.today()),
        "command": re.sub(r"(?<==)\S*/|(?<= )/\S*/", "", run["command"]),
        "commit": run["commit"],
        "device": run["device"],
        "precision": run["precision"],
        "versions": run["versions"] | {"platform": platform.machine()},
        "seconds_of_training": steps[-1]["seconds"],
        "steps": steps[-1]["step"],
        **(labels if recipe.learns_labels else features)(folder, recipe, lines),
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    result = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if "top1" in key}, indent=1))

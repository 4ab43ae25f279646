"""Write down a finished run: `python benchmarks/record_run.py RUN docs/results/NAME.json`.

The curve and the seconds come from the run folder; k-NN (k = 20) of the teacher, of the untrained network and of raw normalised
pixels are measured anew on all labelled images of the recipe's data.
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


def record(folder: Path) -> dict:
    """Everything worth keeping of one run, without paths of the machine."""
    recipe, run = read_recipe(folder / "recipe.yaml"), json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    data = build.dataset(recipe)
    data = {"train": data, "test": build.labelled_test(recipe, data)}
    teacher, untrained = maskwise.load(folder), build.encoder(recipe)
    about = {"k": 20, "pixels": min(96, int(teacher.image_size[0]))}
    trained, before = knn(teacher, data, **about), knn(untrained, data, k=20)
    steps = [line for line in lines if "loss" in line]
    return {
        "recipe_hash": run["recipe_hash"],
        "date": str(date.today()),
        "command": re.sub(r"=\S*/", "=", run["command"]),
        "commit": run["commit"],
        "device": run["device"],
        "precision": run["precision"],
        "versions": run["versions"] | {"platform": platform.machine()},
        "images": {role: len(images) for role, images in data.items()},
        "seconds_of_training": steps[-1]["seconds"],
        "steps": steps[-1]["step"],
        "knn_top1_k20": {
            "teacher": {name: trained.numbers[f"{name}_top1_k20"] for name in ("pooled", "patch_mean")},
            "untrained": {name: before.numbers[f"{name}_top1_k20"] for name in ("pooled", "patch_mean")},
            "pixels": trained.numbers["pixels_top1_k20"],
        },
        "curve": curve(lines),
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    result = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["knn_top1_k20"], indent=1))

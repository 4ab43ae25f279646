"""Score supervised runs on test images by the share of the side that the central crop keeps.

`python -m launch.reproduce.crop_shares RUNS --json docs/results/crop_shares.json`; RUNS holds run folders at any depth.
Random crops of training show objects larger than whole test images do, which costs accuracy (Touvron et al. 2019,
sec. 3). Top-1 on one epoch of training images, cropped and jittered as in training, is measured beside.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

import torch

import maskwise
from launch.reproduce.record_run import training_record
from maskwise import build
from maskwise.bench import record
from maskwise.build import supervised
from maskwise.build.classifiers import classifier_of
from maskwise.data import loader
from maskwise.data.augmentation import color, random_erasing
from maskwise.errors import UserError
from maskwise.functional.classification import topk_correct
from maskwise.recipe.reading import read_recipe

SHARES = (1.0, 0.95, 0.9, 0.875, 0.8, 0.7)


def on_test_crops(folder: Path) -> dict[str, float]:
    """Return {share: top-1 of a run on its test images}, in per cent."""
    return {f"{share:g}": maskwise.evaluate("top1", folder, crop_pct=share).numbers["top1"] for share in SHARES}


@torch.no_grad()
def on_training_crops(folder: Path) -> float:
    """Return the top-1 of a run on one epoch of training images, augmented by a seed of their own, in per cent."""
    recipe, encoder = read_recipe(folder), maskwise.load(folder)
    classifier, data, size = classifier_of(folder, encoder), build.dataset(recipe), recipe.train.batch_size
    steps = loader.steps_per_epoch(len(data), size)
    right = seen = 0
    for batch in loader.batches(
        data, supervised.views(recipe), batch_size=size, total_steps=steps, seed=recipe.seed + 1000
    ):
        images = color.augment(batch.global_crops, batch.params.global_, encoder.mean, encoder.std)
        random_erasing.erase(images, batch.params.erased, recipe.augment.erasing_mode)
        right += int(topk_correct(classifier(images), batch.labels)[0])
        seen += len(images)
    return 100 * right / seen


def runs_in(folder: Path) -> dict[str, Path]:
    """Return the complete supervised runs in a folder by their paths. Raises UserError where there is none."""
    recipes = sorted(folder.rglob("recipe.yaml"))
    found = {
        file.parent.relative_to(folder).as_posix(): file.parent
        for file in recipes
        if read_recipe(file.parent).learns_labels and (file.parent / "checkpoints" / "last").exists()
    }
    if not found:
        raise UserError(f"{folder} holds no supervised run with a checkpoint: give the folder of runs")
    return found


def scored(folder: Path) -> dict:
    """Return how a run was trained, its crops, and its top-1 by share and on training crops."""
    recipe = read_recipe(folder)
    return {
        "trained": training_record(folder)["record"],
        "training_scale": list(recipe.augment.scale),
        "crop_pct": recipe.evaluate.crop_pct,
        "test_crops": on_test_crops(folder),
        "training_crops": on_training_crops(folder),
    }


def text(runs: dict[str, dict]) -> str:
    """Return the table of all runs, and the means over them."""
    lines = ["run" + "".join(f"  {share:>6g}" for share in SHARES) + "  training crops"]
    rows = {name: [*run["test_crops"].values(), run["training_crops"]] for name, run in runs.items()}
    rows["mean"] = [fmean(column) for column in zip(*rows.values())]
    lines += [f"{name}" + "".join(f"  {value:6.2f}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Run the command; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that holds run folders")
    parser.add_argument("--json", type=Path, help="file of the result")
    options = parser.parse_args(words)
    try:
        runs = {name: scored(folder) for name, folder in runs_in(options.runs).items()}
    except UserError as error:
        print(f"crop_shares: {error}", file=sys.stderr)
        return 2
    print(text(runs))
    if options.json:
        seeds = sorted({run["trained"]["seed"] for run in runs.values()})
        record.write(options.json, {"record": record.describe(seed=seeds), "runs": runs})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Score runs on test images by the share of the side that the central crop keeps: top-1 with labels, k-NN without.

`python -m launch.reproduce.crop_shares RUNS --json docs/results/crop_shares.json`; RUNS holds run folders at any depth.
Random crops of training show objects larger than whole test images do, which costs accuracy (Touvron et al. 2019,
sec. 3). Measured beside: with labels, top-1 on one epoch of training images, cropped and jittered as in training;
without, k-NN of raw pixels of the same central crops.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import maskwise
from launch.reproduce.record_run import training_record
from maskwise import build
from maskwise.bench import record
from maskwise.build import supervised
from maskwise.build.classifiers import classifier_of
from maskwise.data import loader
from maskwise.errors import UserError
from maskwise.evaluation.baselines import pixel_size
from maskwise.evaluation.features.views import RawPixels
from maskwise.evaluation.knn import knn as classify
from maskwise.functional.classification import topk_correct
from maskwise.recipe.reading import read_recipe

SHARES = (1.0, 0.95, 0.9, 0.875, 0.8, 0.7)
K = 20


class CentralCrops:
    """The square in the middle of each image of a dataset, `share` of its short side, as a dataset with its labels."""

    def __init__(self, dataset, share: float):
        self.dataset, self.share = dataset, share
        self.labels, self.classes = dataset.labels, getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Tensor:
        """Return the crop uint8 [C, S, S]."""
        image = self.dataset.image(index)
        height, width = image.shape[-2:]
        side = round(self.share * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        return image[:, top : top + side, left : left + side]

    def fingerprint(self) -> str:
        """Return the dataset's fingerprint and the share."""
        return f"{self.dataset.fingerprint()} {self.share}"


def top1(folder: Path, share: float) -> float:
    """Return the top-1 of a supervised run on its test images, in per cent."""
    return maskwise.evaluate("top1", folder, crop_pct=share).numbers["top1"]


def knn(folder: Path, share: float) -> float:
    """Return the k-NN top-1 of a run's pooled vectors, both sets cropped alike, in per cent."""
    return maskwise.evaluate("knn", folder, k=K, feature="pooled", crop_pct=share).numbers["top1"]


def pixels(folder: Path, share: float) -> float:
    """Return the k-NN top-1 of raw pixels of the same crops, at the size that a run's own baseline has."""
    recipe = read_recipe(folder)
    crops = {role: CentralCrops(build.dataset(recipe, role), share) for role in ("train", "test")}
    return classify(RawPixels(pixel_size(maskwise.load(folder))), crops, k=K, feature="pooled").numbers["top1"]


@torch.no_grad()
def training_crops(folder: Path) -> float:
    """Return the top-1 of a run on one epoch of training images, augmented by a seed of their own, in per cent."""
    recipe, encoder = read_recipe(folder), maskwise.load(folder)
    classifier, data, size = classifier_of(folder, encoder), build.dataset(recipe), recipe.train.batch_size
    steps, views = loader.steps_per_epoch(len(data), size), supervised.views(recipe)
    right = seen = 0
    for batch in loader.batches(data, views, batch_size=size, total_steps=steps, seed=recipe.seed + 1000):
        images = supervised.augmented(encoder, recipe.augment.erasing_mode, batch)
        right += int(topk_correct(classifier(images), batch.labels)[0])
        seen += len(images)
    return 100 * right / seen


def runs_in(folder: Path) -> dict[str, Path]:
    """Return the run folders in a folder that have a checkpoint, by their paths. Raises UserError where none has."""
    recipes = sorted(folder.rglob("recipe.yaml"))
    found = {file.parent for file in recipes if (file.parent / "checkpoints" / "last").exists()}
    if not found:
        raise UserError(f"{folder} holds no run with a checkpoint: give the folder of runs")
    return {run.relative_to(folder).as_posix(): run for run in sorted(found)}


def scored(folder: Path) -> dict:
    """Return how a run was trained, its crops, and its accuracy by share with what is measured beside."""
    recipe = read_recipe(folder)
    labels = recipe.learns_labels
    scale = recipe.augment.scale if labels else recipe.crops.global_scale
    score = top1 if labels else knn
    found = {
        "trained": training_record(folder)["record"],
        "training_scale": list(scale),
        "crop_pct": recipe.evaluate.crop_pct,
        "metric": score.__name__,
        "test_crops": {f"{share:g}": score(folder, share) for share in SHARES},
    }
    if labels:
        return {**found, "training_crops": training_crops(folder)}
    return {**found, "pixels": {f"{share:g}": pixels(folder, share) for share in SHARES}}


def line(name: str, run: dict) -> str:
    """Return the row of a run, and where it was trained without labels that of raw pixels."""
    columns = [name, run["metric"], *(f"{value:.2f}" for value in run["test_crops"].values())]
    if "training_crops" in run:
        return "  ".join([*columns, f"training crops {run['training_crops']:.2f}"])
    return "  ".join([*columns, "pixels", *(f"{value:.2f}" for value in run["pixels"].values())])


def main(words: list[str] | None = None) -> int:
    """Run the command; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that holds run folders")
    parser.add_argument("--json", type=Path, help="file of the result")
    options = parser.parse_args(words)
    runs = {}
    try:
        for name, folder in runs_in(options.runs).items():
            runs[name] = scored(folder)
            print(line(name, runs[name]), flush=True)
    except UserError as error:
        print(f"crop_shares: {error}", file=sys.stderr)
        return 2
    if options.json:
        seeds = sorted({run["trained"]["seed"] for run in runs.values()})
        record.write(options.json, {"record": record.describe(seed=seeds), "runs": runs})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

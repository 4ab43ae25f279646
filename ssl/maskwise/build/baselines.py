"""Baselines of k-NN: of a recipe, of images, and of a run, which keeps them as reports/baselines.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from maskwise.build.images import images_at
from maskwise.build.inputs import dataset
from maskwise.build.networks import encoder
from maskwise.build.untrained import untrained_network
from maskwise.data.benchmark_sets import BENCHMARK_SETS
from maskwise.data.datasets import holdout
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.data.notes import notes
from maskwise.distributed.world import World
from maskwise.engine.run_log import RunLog
from maskwise.errors import UserError
from maskwise.evaluation import baselines as knn_baselines
from maskwise.evaluation.report import Report
from maskwise.process.progress import titled
from maskwise.recipe.recipe import Recipe

HELD_OUT = 0.1  # share of each class that is held out of images without test images


def baselines(
    source,
    *,
    test=None,
    k: int | Sequence[int] = (10, 20),
    size: int | None = None,
    backbone: str | None = None,
    image_size: int = 32,
    seed: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    batch_size: int = 256,
) -> Report:
    """Measure k-NN of features that nothing was trained for: an untrained network, raw and PCA-whitened pixels.

    source: a recipe (its images, its network with the initial weights), or labeled images: a folder, a list file or a
    dataset, with test=FOLDER, else its own test split, else a tenth of each class held out. backbone: for images, a
    timm name whose network with random weights, drawn by `seed`, reads them at `image_size`. size: side of the pixels;
    limit_train, limit_test: images of each set, evenly spread. Under torchrun the ranks share the images. Raises
    UserError for images without labels.
    """
    if isinstance(source, Recipe):
        wrong = {"test": test, "backbone": backbone}
        if given := [name for name, value in wrong.items() if value is not None]:
            raise UserError(f"baselines: {given[0]} goes with a folder of images; a recipe has its own")
        data = with_test(dataset(source), dataset(source, "test"))
        untrained = encoder(source)
    else:
        data = folder_sets(source, test)
        untrained = None if backbone is None else untrained_network(backbone, image_size, seed)
    for role, limit in (("train", limit_train), ("test", limit_test)):
        if limit is not None:
            if limit < 1:
                raise UserError(f"baselines: limit_{role} is {limit}; it must be at least 1")
            data[role] = subsample_evenly(data[role], limit)
    world = World.start()
    with world.fail_together():
        untrained = None if untrained is None else untrained.to(world.device)
        report = knn_baselines.baselines(data, world, untrained=untrained, k=k, size=size, batch_size=batch_size)
        report.notes += notes(data)
        report.seeds = {"initial weights": source.seed if isinstance(source, Recipe) else seed} if untrained else {}
    return report


def with_test(train, test) -> dict:
    """Return images by role; without test images a tenth of each class of the training images is held out."""
    if test is None:
        train, test = holdout.split(train, HELD_OUT)
    return {"train": train, "test": test}


def folder_sets(path, test=None) -> dict:
    """Return the training and test images of a folder, a list file or a dataset; see `baselines`."""
    if test is not None:
        return {"train": images_at(path), "test": images_at(test)}
    if isinstance(path, (str, os.PathLike)) and (folder := Path(path).expanduser()).is_dir():
        for name in ("imagenet", "cifar", "flowers"):
            if BENCHMARK_SETS[name].matches(folder):
                return BENCHMARK_SETS[name].read(folder)
    return with_test(images_at(path), None)


class RunBaselines:
    """The baselines of a run, on the images of its k-NN reports; a continued run finds them in its folder.

    untrained: a callable that builds the network with its initial weights.
    """

    def __init__(self, recipe: Recipe, data, test, world: World, run_log: RunLog, untrained: Callable):
        limit = recipe.evaluate.limit_bank
        self.data = {"train": subsample_evenly(data, limit) if limit else data, "test": test}
        self.k, self.world, self.run_log, self.untrained = recipe.evaluate.k, world, run_log, untrained
        self.known = False

    def before(self, call: Callable[..., Report]) -> Callable[..., Report]:
        """Return the k-NN evaluation `call` with the baselines measured before its first time."""

        def evaluation(method) -> Report:
            self.measure()
            return call(method)

        return evaluation

    def measure(self) -> None:
        """Measure and save the baselines, unless the folder holds those of the same images."""
        if self.known:
            return
        self.known = True
        if not self.world.any(self.world.is_main and not self.stored()):
            return
        with titled("k-NN baselines"):
            untrained = self.untrained().to(self.world.device)
            report = knn_baselines.baselines(self.data, self.world, untrained=untrained, k=self.k)
        self.run_log.keep(knn_baselines.NAME, report)
        self.run_log.print_line("\n".join([knn_baselines.line(report), *report.notes]))

    def stored(self) -> bool:
        """Whether the run folder holds the baselines of these images."""
        try:
            report = Report.load(self.run_log.folder / "reports" / f"{knn_baselines.NAME}.json")
        except UserError:
            return False
        return report.data_hash == knn_baselines.data_hash(self.data)

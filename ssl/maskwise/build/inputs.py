"""Datasets, views and batches of a recipe."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from functools import partial

from maskwise.build import supervised
from maskwise.build.builders import builder_for
from maskwise.build.images import Given, given_images
from maskwise.data import loader
from maskwise.data.datasets import holdout
from maskwise.data.datasets.labels import why_unlabeled
from maskwise.data.datasets.torch_dataset import RawItems
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.own_crops import OwnCrops
from maskwise.distributed.environment import local_world_size
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.protocol import labeled_sets
from maskwise.recipe.evaluation_schedule import scheduled
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import named
from maskwise.recipe.sections import Data
from maskwise.recipe.signatures import parameters_of

RGB = (0.0, 0.0, 0.0)  # as many channels as images have where data.mean is null
SHOWN_TO_TRANSFORM = 16  # images that are tried before the run, until one can be read
MOST_WORKERS = 10  # of one rank on a GPU, when speed.workers is auto


def dataset(recipe: Recipe, role: str = "train", given=None):
    """Return the training images, or with role="test" the labeled test images (None when the recipe names none).

    With data.holdout both are parts of one set. given: the training images of a recipe with data.name=python.
    """
    data = recipe.data
    options, cls = data.keywords(), named("data", data.name)
    if data.mean is not None and "channels" in parameters_of(cls)[0]:
        options["channels"] = len(data.mean)
    if "remote" in parameters_of(cls)[0]:
        options["remote"] = recipe.speed.remote()
    if given is not None:
        cls = partial(given_images, given)
    if data.name == "shapes":
        options["seed"] = recipe.seed
        if role == "test":
            options["split"] = "test"
    elif data.holdout is not None:
        return holdout.split(cls(**options), data.holdout)[role == "test"]
    elif role == "test":
        if data.test_path is None and data.test_split is None:
            return None
        options.update(path=data.test_path or options["path"], split=data.test_split, per_class=None)
        return test_images(cls, options, data)
    return cls(**options)


def test_images(cls, options: dict, data: Data):
    """Return the test images of section data; an error names the keys of the test images."""
    try:
        return cls(**options)
    except UserError as error:
        if data.test_path is None:
            text = re.sub(r"=null for all images in .*", "=null for no evaluation during training", str(error))
        else:
            text = str(error).replace("data.path", "data.test_path")
        text = text.replace("data.split", "data.test_split")
        raise UserError(f"test images: {text}") from None


def labeled_test(recipe: Recipe, data, given: Given | None = None):
    """Return the test images of the evaluations during training, None where the recipe schedules none.

    `data` holds the training images. Raises UserError where labels are missing or classes are unknown to `data`.
    """
    evaluate = recipe.evaluate
    plans = [plan for plan in scheduled(evaluate.also) if plan.test is None]
    if not (evaluate.knn_every or plans or evaluate.top1_every):
        return None
    given = given or Given()
    if given.test is None:
        test = dataset(recipe, "test", given.dataset)
    else:
        test = given_images(given.test, len(recipe.data.mean or RGB))
    if test is None:
        return None
    if evaluate.top1_every:
        supervised.check_test(data, test)
        return test
    if not evaluate.knn_every and not any(EVALUATIONS[plan.evaluation].labels for plan in plans):
        return test
    key, off = ("knn_every", "0") if evaluate.knn_every else ("also", "null")
    for role, images in (("training", data), ("test", test)):
        if images.labels is None:
            reason = why_unlabeled(images, f"the {role} images")
            raise UserError(f"evaluate.{key}: {reason}, or evaluate.{key}={off}")
    if evaluate.knn_every or any("train" in EVALUATIONS[plan.evaluation].requires for plan in plans):
        labeled_sets(f"evaluate.{key}", {"train": data, "test": test}, "train", "test")
    return test


def own_tests(recipe: Recipe) -> dict[tuple[str, str], dict]:
    """Return the images that lines of evaluate.also name themselves, {(evaluation, path): {role: images}}.

    Raises UserError for a folder in no layout that the evaluation reads.
    """
    images: dict[tuple[str, str], dict] = {}
    for plan in scheduled(recipe.evaluate.also):
        if plan.test is not None:
            (reader,) = EVALUATIONS[plan.evaluation].readers.values()
            images[plan.evaluation, plan.test] = reader(plan.test)
            if not images[plan.evaluation, plan.test]:
                raise UserError(
                    f"evaluate.also: {plan.evaluation} test={plan.test}: this folder has no layout that it reads; "
                    "see `maskwise list evaluations` and docs/evaluations.md"
                )
    return images


def views(recipe: Recipe, transform: Callable | None = None):
    """Return what the loader makes crops of images with; transform: of the user, in place of multi-crop."""
    if transform is None:
        return builder_for(recipe).views(recipe)
    crops, channels = recipe.crops, len(recipe.data.mean or RGB)
    sizes = {"global_size": crops.global_size, "local_size": crops.local_size, "local_number": crops.local_number}
    return OwnCrops(transform, seed=recipe.seed, channels=channels, **sizes)


def check_transform(recipe: Recipe, data, transform: Callable | None) -> None:
    """Raise UserError for a transform that makes no crops for this recipe of the first readable image."""
    if transform is None:
        return
    if recipe.learns_labels:
        raise UserError(f"transform= is in place of multi-crop, and method {recipe.method.name} has none: leave it out")
    if not callable(transform):
        raise UserError(f"transform= is a {type(transform).__name__}; give a function: image -> list of crops")
    items = RawItems(data)
    for index in range(min(SHOWN_TO_TRANSFORM, len(items))):
        with contextlib.suppress(CorruptImage):
            views(recipe, transform).crops(items.image(index), index, 0)
            return


def inputs(recipe: Recipe, trainer):
    """Return the callable that makes the arguments of a step from a batch: floats, on the batch's device."""
    return builder_for(recipe).inputs(recipe, trainer)


def stream(recipe: Recipe, world: World, data, total_steps: int, start: int, *, transform: Callable | None = None):
    """Return this rank's batches of a run from step `start` on; transform: of the user, in place of multi-crop."""
    own = transform is not None  # gets images as the dataset has them: neither cached nor decoded at a lower resolution
    return loader.batches(
        RawItems(data) if own else data,
        views(recipe, transform),
        repeats=recipe.augment.repeats,
        batch_size=recipe.train.batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=recipe.seed,
        start_step=start,
        total_steps=total_steps,
        workers=workers(recipe, world),
        pin_memory=world.device.type == "cuda",
        cache="none" if own else recipe.speed.cache,
        corrupt_share=recipe.data.corrupt_ceiling,
        decoder=recipe.data.decoder,
        jpeg_scaling=recipe.data.jpeg_scaling and not own,
    )


def workers(recipe: Recipe, world: World) -> int:
    """Return the number of data processes of a rank.

    By default the ranks of a GPU machine share its cores; a CPU has none to spare in training.
    """
    if recipe.speed.workers != "auto":
        return recipe.speed.workers
    if world.device.type != "cuda":
        return 0
    local = local_world_size(world.size)
    return min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // local - 1))

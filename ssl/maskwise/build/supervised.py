"""Building for supervised methods: views and mixed targets, classes, classifier, accuracy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from maskwise.build.classifiers import accuracy
from maskwise.data.augmentation import color, random_erasing
from maskwise.data.augmentation import mixup as mixtures
from maskwise.data.augmentation.mixup import MixupCutMix
from maskwise.data.augmentation.supervised_crop import SupervisedCrop
from maskwise.data.class_matching import class_names, match_classes
from maskwise.data.datasets.files import join_names
from maskwise.data.datasets.labels import why_unlabeled
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import Encoder
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import named


def views(recipe: Recipe) -> SupervisedCrop:
    """Return the training crop of a recipe."""
    return SupervisedCrop(recipe.augment, mean=recipe.data.mean, seed=recipe.seed)


def inputs(recipe: Recipe, trainer):
    """Return the callable batch -> (images, soft targets), on the batch's device: color, erasing and mixing."""
    augment, model = recipe.augment, trainer.method
    mix = MixupCutMix(
        model.student.head.classes,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        prob=augment.mix_prob,
        switch=augment.mix_switch,
        smoothing=augment.smoothing,
    )
    return partial(mixed_batch, model.teacher.encoder, mix, augment.erasing_mode, recipe.seed)


def augmented(encoder: Encoder, erasing_mode: str, batch) -> Tensor:
    """Return the images of a batch [views * B, C, S, S] with color jitter and erasing, normalized."""
    images = color.augment(batch.global_crops, batch.params.global_, encoder.mean, encoder.std)
    random_erasing.erase(images, batch.params.erased, erasing_mode)
    return images


def mixed_batch(encoder: Encoder, mix: MixupCutMix, erasing_mode: str, seed: int, batch) -> tuple[Tensor, Tensor]:
    """Return the normalized images [views * B, C, S, S] and soft targets [B, classes] of a batch."""
    images = augmented(encoder, erasing_mode, batch)
    return mix(images, batch.labels, int(keyed_random.make_key(mixtures.STREAM, seed, batch.step)))


def classes(recipe: Recipe, data) -> int:
    """Return the number of classes of a run.

    Raises UserError for images without labels, and for fewer classes than the images have.
    """
    labels = data.labels
    if labels is None or int(torch.as_tensor(labels).min()) < 0:
        reason = why_unlabeled(data, "the training images")
        raise UserError(f"method {recipe.method.name} learns labels: {reason}, or take a method without, such as ibot")
    names = class_names(data)
    present = len(names) if names else int(torch.as_tensor(labels).max()) + 1
    given = recipe.classifier.classes
    if given is not None and given < present:
        raise UserError(
            f"classifier.classes={given} and the training images have {present} classes; give {present}, or null"
        )
    return given or present


def check_test(data, test) -> None:
    """Raise UserError for test images without labels, or with other classes than the training images."""
    if test.labels is None:
        raise UserError(f"evaluate.top1_every: {why_unlabeled(test, 'the test images')}, or evaluate.top1_every=0")
    trained, tested = class_names(data), class_names(test)
    if trained and tested:
        places = match_classes(tested, trained).tolist()
        unknown = [name for name, place in zip(tested, places) if place < 0]
        absent = [name for place, name in enumerate(trained) if place not in places]
        root = getattr(test, "root", None)
        place = "the test set" if root is None else f"{root.name}/"
        if unknown:
            difference = f"{place} has class {unknown[0]}, which the training images do not have"
        elif absent:
            classes = f"class {absent[0]}" if len(absent) == 1 else f"classes {join_names(absent)}"
            difference = f"{place} has no images of {classes}"
        if unknown or absent:
            raise UserError(f"{difference}; give test images of the same classes, or evaluate.top1_every=0")


def method(recipe: Recipe, encoder: Encoder, world: World, classes: int, precision: str) -> nn.Module:
    """Return the method on an encoder, with a classifier; a function of the recipe's seed."""
    name, speed = recipe.method.name, recipe.speed
    if speed.shard != "none" and world.size > 1:
        raise UserError(
            f"speed.shard={speed.shard} is for methods with a student and a teacher, not for {name}: leave it out"
        )
    if speed.checkpointing == "blocks" and recipe.method.keywords().get("dropout"):
        raise UserError(
            "speed.checkpointing=blocks computes blocks again, which with method.dropout would drop other tokens; "
            "give none"
        )
    with keyed_random.seed_scope(recipe.seed + 1):
        classifier = named("classifier", recipe.classifier.name)(encoder, classes, **recipe.classifier.keywords())
    options = {"splits": recipe.augment.splits, "average": recipe.teacher.momentum is not None, "seed": recipe.seed}
    return named("method", name)(encoder, classifier, **recipe.method.keywords(), **options)


def evaluations(recipe: Recipe, data, test, world: World) -> dict:
    """Return the accuracy of the run's own classifier, by the name of its report."""
    return {"top1": partial(accuracy, test, world, class_names(data))} if recipe.evaluate.top1_every else {}

"""What building does otherwise for a method that learns labels: its views and inputs, its classes, its classifier, its accuracy."""

from __future__ import annotations

from functools import partial

import torch

from maskwise.data import augment as colour
from maskwise.data import erasing
from maskwise.data import mixing as mixtures
from maskwise.data.mixing import Mixing
from maskwise.data.train_crop import TrainCrop
from maskwise.evaluation.classifier import Classifier, Logits
from maskwise.evaluation.report import Report
from maskwise.evaluation.top1 import top1
from maskwise.export import layouts, trained_classifier
from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.recipe import Recipe
from maskwise.recipe_schema import named

IN_THE_WORKER = ("size", "scale", "ratio", "flip", "jitter", "policy", "interpolation", "splits", "erasing", "spare_first")


def views(recipe: Recipe) -> TrainCrop:
    """What the loader makes of an image."""
    chosen = {key: getattr(recipe.augment, key) for key in IN_THE_WORKER}
    return TrainCrop(**chosen, mean=recipe.data.mean, seed=recipe.seed)


def inputs(recipe: Recipe, running):
    """The callable batch -> (images, soft targets) on the batch's device: colour, erasing and mixing; `running` is the run's Trainer."""
    encoder, augment = running.method.teacher.encoder, recipe.augment
    mix = Mixing(
        class_count(running.method), mixup=augment.mixup, cutmix=augment.cutmix, prob=augment.mix_prob, switch=augment.mix_switch, smoothing=augment.smoothing
    )
    return partial(prepared, encoder, mix, augment.erasing_mode, recipe.seed)


def prepared(encoder, mix: Mixing, mode: str, seed: int, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images [views * B, C, S, S] and soft targets [B, classes] of a batch."""
    images = colour.augment(batch.global_crops, batch.params.global_, encoder.mean, encoder.std)
    erasing.erase(images, batch.params.erased, mode)
    return mix(images, batch.labels, int(draws.mix(mixtures.STREAM, seed, batch.step)))


def classes_of(recipe: Recipe, data) -> int:
    """How many classes a run tells apart; raises UserError for images without labels and for fewer classes than the images have."""
    labels = data.labels
    if labels is None or int(torch.as_tensor(labels).min()) < 0:
        raise UserError(
            f"method {recipe.method.name} learns labels and the training images have none: give one subfolder per class or a list with labels, or a method "
            "that needs none, such as ibot"
        )
    names = getattr(data, "classes", None)
    there = len(names) if names else int(torch.as_tensor(labels).max()) + 1
    asked = recipe.classifier.classes
    if asked is not None and asked < there:
        raise UserError(f"classifier.classes={asked} and the training images have {there} classes; give {there}, or null")
    return asked or there


def about(classes: int | None, data) -> dict:
    """What a checkpoint keeps of the classes: their number, and their names where the images have any."""
    names = getattr(data, "classes", None)
    return {} if classes is None else {"classes": {"count": classes, "names": list(map(str, names)) if names else None}}


def check_test(data, test) -> None:
    """Raises UserError where the test images cannot be scored by what learns the training images' classes."""
    if test.labels is None:
        raise UserError("evaluate.top1_every: the test images have no labels; give one subfolder per class, or evaluate.top1_every=0")
    mine, theirs = getattr(data, "classes", None), getattr(test, "classes", None)
    if mine and theirs and list(mine) != list(theirs):
        strange = sorted(set(map(str, theirs)) - set(map(str, mine)))
        told = f"{strange[0]} is not among the training images'" if strange else f"{len(theirs)} of {len(mine)} are there"
        raise UserError(f"the classes of the test images are other ones: {told}; give test images of the same classes, or evaluate.top1_every=0")


def method(recipe: Recipe, encoder, classes: int):
    """The method on an encoder, with a classifier of so many classes, a function of the recipe's seed."""
    with draws.seeded(recipe.seed + 1):
        classifier = named("classifier", recipe.classifier.name)(encoder, classes, **recipe.classifier.keywords())
    if recipe.speed.checkpointing == "blocks" and recipe.method.keywords().get("dropout"):
        raise UserError("speed.checkpointing=blocks computes blocks again, which with method.dropout would drop other tokens; give none")
    options = {"splits": recipe.augment.splits, "average": recipe.teacher.momentum is not None, "seed": recipe.seed}
    return named("method", recipe.method.name)(encoder, classifier, **recipe.method.keywords(), **options)


def class_count(model) -> int:
    """Classes that a method's classifier tells apart."""
    return model.student.head.classes


def judged(model, names=None, network: str = "teacher") -> Classifier:
    """One of a method's two networks as a classifier of images, as the evaluations take it."""
    chosen = getattr(model, network)
    return handed(chosen.encoder, chosen.head, names)


def handed(encoder, classifier, names=None) -> Classifier:
    """An encoder and a trained classifier as the evaluations take it."""
    built = Classifier(Logits(encoder, classifier), torch.nn.Identity(), "pooled")
    built.kind, built.count, built.classes = "the run's own", classifier.classes, list(names) if names else None
    return built


def accuracy(test, world, model) -> Report:
    """Top-1 and top-5 of the teacher on the test images and, where it is an average, of the student beside it."""
    report = top1(model.teacher.encoder, {"test": test}, world, classifier=judged(model))
    if model.teacher is not model.student:
        raw = top1(model.student.encoder, {"test": test}, world, classifier=judged(model, network="student"))
        report.numbers.update({f"student_{key}": value for key, value in raw.numbers.items()})
    return report


def classifier_of(model, encoder, weights: str = "teacher", light: bool = False) -> Classifier | None:
    """The classifier of a run folder's last checkpoint or of an exported folder, on an encoder loaded from it; None where there is none.

    light: without what it needs for training alone (MAP-light). Raises UserError where it knows no such form.
    """
    trained = trained_classifier.read(layouts.found(model), weights)
    if trained is None:
        return None
    if light:
        trained = trained.lightened(encoder)
    found = handed(encoder, trained.on(encoder), trained.classes)
    found.kind += ", light" * trained.light
    return found

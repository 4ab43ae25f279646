"""The two kinds of training, self-supervised and supervised: what each builds from a recipe, and the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maskwise.build import self_supervised, supervised
from maskwise.recipe.recipe import Recipe


@dataclass(frozen=True)
class Builder:
    """The functions in which the two kinds of training differ.

    views(recipe) -> callable of the loader: an image -> crops;
    inputs(recipe, trainer) -> callable: a batch -> the arguments of a step, on the batch's device;
    classes(recipe, data) -> number of classes, None without labels;
    method(recipe, encoder, world, classes, precision) -> student, teacher and their heads as one module;
    evaluations(recipe, data, test, world) -> {name: callable(method) -> Report}, those of this kind of training alone.
    """

    views: Callable
    inputs: Callable
    classes: Callable
    method: Callable
    evaluations: Callable


# by the attribute `learns_labels` of the method's class
BUILDERS = {
    False: Builder(
        views=self_supervised.views,
        inputs=self_supervised.inputs,
        classes=self_supervised.classes,
        method=self_supervised.method,
        evaluations=self_supervised.evaluations,
    ),
    True: Builder(
        views=supervised.views,
        inputs=supervised.inputs,
        classes=supervised.classes,
        method=supervised.method,
        evaluations=supervised.evaluations,
    ),
}


def builder_for(recipe: Recipe) -> Builder:
    """Return the builder of a recipe's method."""
    return BUILDERS[recipe.learns_labels]

"""The composition root: turns a recipe into objects and runs it."""

from maskwise.build.builders import BUILDERS, Builder, builder_for
from maskwise.build.evaluations import evaluations
from maskwise.build.inputs import dataset, inputs, labeled_test, stream, views, workers
from maskwise.build.networks import encoder, initial_model, method
from maskwise.build.running.run import extend, train
from maskwise.build.training import resolved_precision, trainer

__all__ = [
    "BUILDERS",
    "Builder",
    "builder_for",
    "dataset",
    "encoder",
    "evaluations",
    "extend",
    "initial_model",
    "inputs",
    "labeled_test",
    "method",
    "resolved_precision",
    "stream",
    "train",
    "trainer",
    "views",
    "workers",
]

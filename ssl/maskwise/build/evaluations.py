"""Evaluations and figures during training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from maskwise.build.baselines import RunBaselines
from maskwise.build.builders import builder_for
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.distributed.world import World
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.report import Report
from maskwise.evaluation.suite.attention_sheets import training_sheet
from maskwise.recipe.evaluation_schedule import Scheduled, scheduled
from maskwise.recipe.recipe import Recipe

FIGURE_IMAGES = 8


def evaluations(
    recipe: Recipe,
    data,
    test,
    world: World,
    own: Mapping[tuple[str, str], dict] = MappingProxyType({}),
    baselines: RunBaselines | None = None,
) -> dict:
    """Return the evaluations during training by report name, each a callable(method) -> Report.

    own: the images of lines that name their own, of `inputs.own_tests`. baselines: measured before the first k-NN.
    """
    evaluate = recipe.evaluate
    calls = builder_for(recipe).evaluations(recipe, data, test, world) if test is not None else {}
    planned = scheduled(evaluate.also)
    if test is not None and evaluate.knn_every:
        planned = [Scheduled("knn", "knn", 0, evaluate.limit_bank, options={"k": evaluate.k}), *planned]
    sets = {plan.name: own.get((plan.evaluation, plan.test), {"test": test}) for plan in planned}
    calls |= {plan.name: partial(teacher_report, plan, data, sets[plan.name], world) for plan in planned}
    if "knn" in calls and evaluate.baselines and baselines is not None:
        calls["knn"] = baselines.before(calls["knn"])
    return calls


def due_every(recipe: Recipe, steps_per_epoch: int) -> dict[str, int]:
    """Return the steps between two reports of each evaluation, 0 for only at the end."""
    evaluate = recipe.evaluate
    epochs = {"knn": evaluate.knn_every, "top1": evaluate.top1_every}
    epochs |= {plan.name: plan.every for plan in scheduled(evaluate.also)}
    return {name: every * steps_per_epoch for name, every in epochs.items()}


def teacher_report(plan: Scheduled, data, sets: Mapping, world: World, method) -> Report:
    """Evaluate the teacher's encoder on evenly spread subsets of the training (unaugmented) and test images."""
    images = {"train": subsample_evenly(data, plan.limit_train) if plan.limit_train else data}
    images |= {
        role: subsample_evenly(part, plan.limit_test) if plan.limit_test and hasattr(part, "image") else part
        for role, part in sets.items()
    }
    return EVALUATIONS[plan.evaluation](method.teacher.encoder, images, world, **plan.options)


def masking_figure(method, batch) -> dict:
    """Draw the teacher's attention on the first images of a batch, and the method's masks."""
    images = batch.global_crops[: min(FIGURE_IMAGES, len(batch.index))]
    sheet = training_sheet(method.teacher.encoder, images, method.masking, batch.index[: len(images)])
    return {"attention_and_masks": sheet}

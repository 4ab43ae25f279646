"""The report that `maskwise doctor` prints."""

from __future__ import annotations

from maskwise import build
from maskwise.distributed.world import World
from maskwise.doctor.advice import advice
from maskwise.doctor.bottleneck import bottleneck, inputs_to_shrink
from maskwise.doctor.machine import GIB, describe_machine, free_memory
from maskwise.doctor.measure import Measurement, measure
from maskwise.errors import UserError
from maskwise.recipe.recipe import Recipe


def report_text(recipe: Recipe | None, seconds: float) -> str:
    """Describe this machine and, if a recipe is given, measure it for about `seconds`."""
    world = World.start()
    if world.size > 1:  # the ranks would compete for the machine
        world.close()
        raise UserError("doctor measures one process; start it without torchrun")
    given = recipe or Recipe()
    precision = build.resolved_precision(given, world.device)
    lines = aligned(describe_machine(world.device, precision, requested=given.train.precision))
    if recipe is None:
        hint = (
            "give a recipe to measure it: `maskwise doctor debug/tiny`; "
            "`maskwise train --data FOLDER` chooses one for your images"
        )
        return "\n".join([*lines, "", hint])
    measurement = measure(recipe, seconds, world)
    lines += [
        "",
        f"{recipe.source}: {recipe.method.name}, {recipe.backbone.name}, {measurement.batch} images per step",
        *aligned(measurement_facts(measurement, free_memory(world.device), labels=recipe.learns_labels)),
    ]
    items = [f"  - {line}" for line in advice(recipe, measurement.images)]
    return "\n".join([*lines, *(["", "advice", *items] if items else [])])


def measurement_facts(measurement: Measurement, free: int, *, labels: bool) -> list[tuple[str, str]]:
    """The measurement as (name, value) in words; free: bytes of free memory; labels: of a supervised recipe."""
    batch, tried = measurement.batch, measurement.tried
    extrapolated = "" if tried == batch else f", extrapolated from steps of {tried}"
    fits = "fits"
    if measurement.memory >= free:
        remedy = f"lower train.batch_size, or use {inputs_to_shrink(labels)}"
        fits = f"DOES NOT FIT into the {free / GIB:.1f} GiB of free memory: {remedy}"
    step = ("step", f"{measurement.step:.3f} s ({batch / measurement.step:.1f} img/s){extrapolated}")
    memory = ("memory at peak", f"{measurement.memory / GIB:.2f} GiB{extrapolated}; {fits}")
    if measurement.loading is None:
        return [
            step,
            memory,
            ("loading", f"not measured ({measurement.reason})"),
            ("img/s", f"{measurement.rate:.1f} if loading keeps up"),
        ]
    mode = "before each step, without workers"
    if measurement.workers:
        mode = f"{measurement.workers} workers in parallel with the step"
    loading = f"{measurement.loading:.3f} s per batch ({batch / measurement.loading:.1f} img/s), {mode}"
    return [
        step,
        ("loading", loading),
        memory,
        ("img/s", f"{measurement.rate:.1f} expected"),
        ("verdict", bottleneck(measurement.waiting, workers=measurement.workers > 0, labels=labels)),
    ]


def aligned(facts: list[tuple[str, str]]) -> list[str]:
    """Facts as lines with aligned values."""
    return [f"{name:<15} {value}" for name, value in facts]

"""The doctor's words: what `maskwise doctor` prints."""

from __future__ import annotations

from maskwise import build
from maskwise.distributed.world import World
from maskwise.doctor.advice import advice
from maskwise.doctor.examination import Finding, examine
from maskwise.doctor.machine import GIB, free_memory, machine
from maskwise.functional.errors import UserError
from maskwise.recipe import Recipe


def told(recipe: Recipe | None, seconds: float) -> str:
    """The report on this machine and, if there is a recipe, on the recipe."""
    world = World.start()  # torchrun's ranks would measure one another
    if world.size > 1:
        world.close()
        raise UserError("doctor looks at one process; start it without torchrun")
    precision = build.resolved_precision(recipe or Recipe(), world.device)
    lines = rows(machine(world.device, precision))
    if recipe is None:
        return "\n".join([*lines, "", "give a recipe to measure it: `maskwise doctor debug/tiny`; `maskwise train --data FOLDER` picks one for your images"])
    found = examine(recipe, seconds, world)
    lines += ["", f"{recipe.source}: {recipe.method.name}, {recipe.backbone.name}, {found.batch} images a step", *rows(measured(found, free_memory(world.device)))]
    return "\n".join([*lines, "", "advice", *(f"  - {line}" for line in advice(recipe, found.images))])


def measured(found: Finding, free: int) -> list[tuple[str, str]]:
    """What was measured, in words."""
    reach = "" if found.tried == found.batch else f", continued from steps of {found.tried}"
    room = "fits" if found.memory < free else f"DOES NOT FIT into the {free / GIB:.1f} GiB that are free: lower train.batch_size or the crops"
    facts = [
        ("step", f"{found.step:.3f} s ({found.batch / found.step:.1f} img/s){reach}"),
        ("memory at peak", f"{found.memory / GIB:.2f} GiB{reach}; {room}"),
    ]
    if found.loading is None:
        return [*facts, ("loading", f"not measured ({found.reason})"), ("img/s", f"{found.rate:.1f} if loading keeps up")]
    beside = f"{found.workers} workers beside the step" if found.workers else "before each step, without workers"
    facts.insert(1, ("loading", f"{found.loading:.3f} s a batch ({found.batch / found.loading:.1f} img/s), {beside}"))
    remedy = {
        "data-bound": "more speed.workers, smaller image files, or tar shards would help; a faster device would not",
        "compute-bound": "fewer or smaller crops, a smaller backbone or a faster device would help; faster loading would not",
    }
    return [*facts, ("img/s", f"{found.rate:.1f} expected"), ("verdict", f"{found.bound}: {remedy[found.bound]}")]


def rows(facts: list[tuple[str, str]]) -> list[str]:
    """Facts as aligned lines."""
    return [f"{what:<15} {value}" for what, value in facts]

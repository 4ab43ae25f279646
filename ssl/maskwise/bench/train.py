"""`maskwise bench train`: training end to end, from files on disk to the updated teacher, by parts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from maskwise.bench.table import table

PARTS = (
    "wait",
    "copy",
    "color",
    "teacher",
    "mask",
    "student",
    "student head",
    "loss",
    "backward",
    "clip",
    "optimizer",
    "EMA",
    "rest",
)


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of the benchmark."""
    options = make("maskwise bench train", description="Time training: loader, color on the device, steps.")
    add = options.add_argument
    add("recipe", metavar="RECIPE", nargs="?", default="debug/tiny", help="a recipe (default: debug/tiny)")
    add("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    add("--steps", type=int, default=8, help="steps timed as a whole, and again by parts (default: %(default)s each)")
    add("--images", type=int, default=16, help="images decoded and cropped one by one (default: %(default)s)")
    add("--threads", type=int, default=None, help="CPU threads of the step (default: torch's)")
    return options


def run(options) -> dict:
    """Train for a few steps -> JSON-able measurements."""
    import torch

    from maskwise import build
    from maskwise.bench import machine, parts, record
    from maskwise.distributed.world import World
    from maskwise.process.malloc import keep_freed_memory
    from maskwise.recipe.consistency import fitted
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe(options.recipe, *options.overrides)
    if options.threads:
        torch.set_num_threads(options.threads)
    world = World.start()
    if recipe.speed.keep_memory and world.device.type == "cpu":
        keep_freed_memory()
    data = build.dataset(recipe)
    recipe = fitted(recipe, len(data), world.size)
    trainer = build.trainer(recipe, world, images=len(data))
    clock = parts.Clock(world.device)
    rate = machine.matmul_rate(world.device, torch.bfloat16 if trainer.precision == "bf16" else torch.float32)
    step = training_step(recipe, world, data, trainer, clock, total_steps=2 * options.steps + 3)
    measured = measure(step, trainer, clock, options.steps)
    per_step, flops = statistics.median(measured["turns"]), measured["counts"]["flops"]
    return {
        "bench": "train",
        "recipe": options.recipe,
        "overrides": options.overrides,
        "batch": recipe.train.batch_size,
        "record": record.describe(world.device, seed=recipe.seed),
        "precision": trainer.precision,
        "workers": build.workers(recipe, world),
        "images_per_second": recipe.train.batch_size / per_step,
        "seconds_per_step": per_step,
        "turns": measured["turns"],
        "data_wait_share": sum(measured["waits"]) / sum(measured["turns"]),
        "flops_per_step": flops,
        "flops_per_second": flops / per_step,
        "matmul_rate": rate,
        "share_of_matmul_rate": flops / per_step / rate,
        "host_reads_per_step": measured["counts"]["host_reads"],
        "peak_memory": machine.peak_memory(world.device),
        "parts": measured["parts"],
        "per_image_alone": per_image(recipe, data, min(options.images, len(data))),
    }


def training_step(recipe, world, data, trainer, clock, total_steps: int) -> Callable[[], float]:
    """Return a function that loads a batch and does a step -> seconds waited for the batch."""
    from maskwise import build
    from maskwise.engine.loop import prefetch

    inputs = build.inputs(recipe, trainer)
    batches = prefetch(build.stream(recipe, world, data, total_steps, 0), world.device)

    def step() -> float:
        with clock.part("wait"):
            begin = time.perf_counter()
            batch, ids = next(batches)
            waited = time.perf_counter() - begin
        with clock.part("color"):
            crops = inputs(batch)
        trainer.step(*crops, sample_ids=ids)
        return waited

    return step


def measure(step: Callable[[], float], trainer, clock, count: int) -> dict:
    """Time `count` steps as a whole and `count` by parts, after two to warm up; count the operations of one more."""
    from maskwise.bench import machine, parts

    for _ in range(2):  # libraries warm up, workers fill their queues
        step()
    machine.wait(clock.device)
    waits, seconds = [], []
    for _ in range(count):
        begin = time.perf_counter()
        waits.append(step())
        machine.wait(clock.device)
        seconds.append(time.perf_counter() - begin)
    clock.seconds.clear()
    with clock.around(*timed_calls(trainer)), clock.part("rest"):
        for _ in range(count):
            step()
    part_seconds = {name: clock.seconds.get(name, 0.0) / count for name in PARTS}
    return {"waits": waits, "turns": seconds, "parts": part_seconds, "counts": parts.count(step)}


def per_image(recipe, data, count: int) -> dict[str, float]:
    """Median seconds to decode and to crop one image, in this process."""
    from maskwise import build
    from maskwise.data.decoding.jpeg import resolve_decoder
    from maskwise.data.reader import DecodedDataset

    reader, views = DecodedDataset(data, resolve_decoder(recipe.data.decoder)), build.views(recipe)
    seconds: dict[str, list[float]] = {"decode": [], "crops": []}
    for i in range(count):
        begin = time.perf_counter()
        image = reader.image(i)
        decoded = time.perf_counter()
        views.batch([image], [i], 0)
        seconds["decode"].append(decoded - begin)
        seconds["crops"].append(time.perf_counter() - decoded)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed_calls(trainer) -> list[tuple[object, str, str]]:
    """(owner, attribute, part) of the calls that make up a trainer's step, for `Clock.around`."""
    import torch

    from maskwise.engine import trainer as engine
    from maskwise.functional import losses

    method = trainer.method
    calls = [
        (method, "teacher_forward", "teacher"),
        (method, "sample_masks", "mask"),
        (method, "student_forward", "student"),
        (method.student.head, "embed", "student head"),
        (losses, "dino_loss_from_probs", "loss"),
        (losses, "ibot_loss_from_probs", "loss"),
        (torch.Tensor, "backward", "backward"),
        (trainer, "_clip", "clip"),
        (engine, "step_if", "optimizer"),
        (method, "update_teacher", "EMA"),
        (trainer, "_floats", "copy"),
    ]
    if method.learns_labels:
        calls += [(method, "student_features", "student"), (method.student.head, "losses", "loss")]
    return [call for call in calls if hasattr(call[0], call[1])]  # other methods have fewer parts


def text(result: dict) -> str:
    """Format the result as tables."""
    about, step = result["record"], result["seconds_per_step"]
    total = sum(result["parts"].values())
    parts = [[name, seconds, 100 * seconds / total] for name, seconds in result["parts"].items()]
    alone = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in result["per_image_alone"].items())
    return "\n".join(
        [
            f"{about['hardware']}, {about['threads']} threads, {result['workers']} workers, {result['precision']}, "
            f"torch {about['torch']}, commit {about['commit'] or 'unknown'}",
            f"{result['recipe']} at batch {result['batch']}: {result['images_per_second']:.3g} img/s, "
            f"{step:.3g} s per step, {100 * result['data_wait_share']:.3g} % waiting for data,",
            f"{result['flops_per_second'] / 1e9:.3g} GFLOP/s ({100 * result['share_of_matmul_rate']:.3g} % "
            f"of the matmul rate {result['matmul_rate'] / 1e9:.3g}), {result['host_reads_per_step']} host reads "
            f"per step, {result['peak_memory'] / 2**30:.3g} GiB peak memory",
            "",
            table([["part", "s", "%"], *parts]),
            "",
            f"per image, in one process: {alone}",
        ]
    )

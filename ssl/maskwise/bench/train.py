"""`maskwise bench train`: a recipe as it trains, from files on disk to the moved teacher, and where the time goes."""

from __future__ import annotations

import argparse
import statistics
import time

from maskwise.bench.table import table

PARTS = ("wait", "copy", "colour", "teacher", "mask", "student", "student head", "loss", "backward", "clip", "optimizer", "EMA", "rest")


def parser(make=argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What the verb takes."""
    it = make("maskwise bench train", description="Time training as it is: loader, colour on the device, steps.")
    it.add_argument("recipe", metavar="RECIPE", nargs="?", default="debug/tiny", help="a recipe (default: debug/tiny, on embedded images)")
    it.add_argument("overrides", metavar="section.key=value", nargs="*", help="what to change in the recipe")
    it.add_argument("--steps", type=int, default=8, help="steps timed whole, and again by parts (default 8 each)")
    it.add_argument("--images", type=int, default=16, help="images decoded and cropped alone, for the cost of each (default 16)")
    it.add_argument("--threads", type=int, default=None, help="CPU threads of the step (default: torch's)")
    return it


def run(options) -> dict:
    """Train for a few steps -> what was measured, JSON-able."""
    import torch

    from maskwise import build
    from maskwise.bench import machine, parts
    from maskwise.data.decoders import resolved
    from maskwise.data.reader import Decoded
    from maskwise.distributed.world import World
    from maskwise.engine.loop import ahead
    from maskwise.engine.memory import keep_freed_memory
    from maskwise.recipe import check_run, read_recipe

    recipe = read_recipe(options.recipe, *options.overrides)
    if options.threads:
        torch.set_num_threads(options.threads)
    world = World.start()
    if recipe.speed.keep_memory and world.device.type == "cpu":
        keep_freed_memory()
    data = build.dataset(recipe)
    check_run(recipe, len(data), world.size)
    trainer = build.trainer(recipe, world, images=len(data))
    inputs, steps = build.inputs(recipe, trainer), options.steps
    clock = parts.Clock(world.device)
    rate = machine.matmul_rate(world.device, torch.bfloat16 if trainer.precision == "bf16" else torch.float32)
    batches = ahead(build.stream(recipe, world, data, 2 * steps + 3, 0), world.device)

    def step() -> float:
        with clock.part("wait"):
            begin = time.perf_counter()
            batch, ids = next(batches)
            waited = time.perf_counter() - begin
        with clock.part("colour"):
            crops = inputs(batch)
        trainer.step(*crops, sample_ids=ids)
        return waited

    step(), step()  # libraries warm up, workers fill their queues
    machine.wait(world.device)
    waits, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        waits.append(step())
        machine.wait(world.device)
        seconds.append(time.perf_counter() - begin)
    clock.seconds.clear()
    with clock.around(*places(trainer)), clock.part("rest"):
        for _ in range(steps):
            step()
    by_part = {name: clock.seconds.get(name, 0.0) / steps for name in PARTS}
    counts = parts.count(step)
    reader, crop = Decoded(data, resolved(recipe.data.decoder)), build.views(recipe)
    alone = {"decode": [], "crops": []}
    for i in range(min(options.images, len(data))):
        begin = time.perf_counter()
        image = reader.image(i)
        middle = time.perf_counter()
        crop.batch([image], [i], 0)
        alone["decode"].append(middle - begin)
        alone["crops"].append(time.perf_counter() - middle)
    per_step, images = statistics.median(seconds), recipe.train.batch_size
    return {
        "bench": "train", "recipe": options.recipe, "overrides": options.overrides, "batch": images, "machine": machine.about(world.device),
        "precision": trainer.precision, "workers": build.workers(recipe, world), "images_per_second": images / per_step, "seconds_per_step": per_step,
        "turns": seconds, "data_wait_share": sum(waits) / sum(seconds), "flops_per_step": counts["flops"], "flops_per_second": counts["flops"] / per_step,
        "matmul_rate": rate, "share_of_matmul_rate": counts["flops"] / per_step / rate, "host_reads_per_step": counts["host_reads"],
        "peak_memory": machine.peak_memory(world.device), "parts": by_part,
        "per_image_alone": {name: statistics.median(each) for name, each in alone.items()},
    }  # fmt: skip


def places(trainer) -> list[tuple[object, str, str]]:
    """The parts of a trainer's step, for `Clock.around`; what its method lacks is left out."""
    import torch

    from maskwise.engine import trainer as engine

    method = trainer.method
    known = [
        (method, "teach", "teacher"), (method, "hide", "mask"), (method, "study", "student"), (method.student.head, "embed", "student head"),
        (method, "image_term", "loss"), (method, "patch_term", "loss"), (torch.Tensor, "backward", "backward"), (trainer, "_clip", "clip"),
        (engine, "step_if", "optimizer"), (method, "update_teacher", "EMA"), (trainer, "_floats", "copy"),
    ]  # fmt: skip
    if hasattr(method, "learns_labels"):
        known += [(method, "look", "student"), (method.student.head, "losses", "loss")]
    return [each for each in known if hasattr(each[0], each[1])]


def text(result: dict) -> str:
    """The result as tables."""
    machine, step = result["machine"], result["seconds_per_step"]
    total = sum(result["parts"].values())
    alone = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in result["per_image_alone"].items())
    return "\n".join([
        f"{machine['device']}, {machine['threads']} threads, {result['workers']} workers, {result['precision']}, torch {machine['torch']}, commit {machine['commit']}",
        f"{result['recipe']} at batch {result['batch']}: {result['images_per_second']:.3g} img/s, {step:.3g} s a step, {100 * result['data_wait_share']:.3g} % waiting for data,",
        f"{result['flops_per_second'] / 1e9:.3g} GFLOP/s ({100 * result['share_of_matmul_rate']:.3g} % of the matmul rate {result['matmul_rate'] / 1e9:.3g}), "
        f"{result['host_reads_per_step']} host reads a step, {result['peak_memory'] / 2**30:.3g} GiB at most",
        "",
        table([["part", "s", "%"], *([name, seconds, 100 * seconds / total] for name, seconds in result["parts"].items())]),
        "",
        f"one image alone in one process: {alone}",
    ])  # fmt: skip

"""Run all GPU measurements: `python -m launch.reproduce.gpu --images FOLDER --out docs/results/gpu.json`.

For ViT-S, B and L with 16-px patches (2x224 + 10x96, K = 8192, iBOT with AttMask-Hint): steps on synthetic tensors over
a sweep of batches, with and without compilation; the loader alone; and training end to end from JPEGs; with memory and
host reads. Writes raw JSON and prints a Markdown table with the targets. `--miniature` does the same
with a tiny model on any device, to test the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ssl"))

MODELS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
TARGETS = {"ViT-S/16": 2200, "ViT-B/16": 720, "ViT-L/16": 220}  # img/s end to end on one H200
BATCHES = {"ViT-S/16": (64, 128, 256, 512), "ViT-B/16": (32, 64, 128, 256), "ViT-L/16": (16, 32, 64, 128)}
SMALL = [
    "backbone.embed_dim=48",
    "backbone.depth=2",
    "backbone.num_heads=3",
    "head.hidden=64",
    "head.bottleneck=16",
    "head.prototypes=64",
    "crops.global_size=64",
    "crops.local_size=32",
    "crops.local_number=2",
]


def recipe_for(model: str, batch: int, compiled: bool, checkpointing: str, images: str | None, miniature: bool):
    from maskwise.recipe.reading import read_recipe

    data = (
        [f"data.path={images}", "data.split=null", "data.test_split=null"]
        if images
        else ["data.name=shapes", "data.count=64"]
    )
    words = [
        f"backbone.name={MODELS[model]}",
        f"train.batch_size={batch}",
        f"speed.compile={str(compiled).lower()}",
        f"speed.checkpointing={checkpointing}",
        "evaluate.knn_every=0",
        "train.epochs=100",
        *data,
    ]
    return read_recipe("pretrain/attmask_hint_vits16", *words, *(SMALL if miniature else []))


def synthetic(recipe, steps: int) -> dict:
    """Return img/s of steps on random crops on the device."""
    import torch

    from maskwise import build
    from maskwise.bench import machine, parts
    from maskwise.bench.implementation import random_crops
    from maskwise.distributed.world import World

    world = World.start()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = build.trainer(recipe, world, images=1000 * recipe.train.batch_size)
    crops, ids = random_crops(recipe, world.device), torch.arange(recipe.train.batch_size)
    begin = time.perf_counter()
    for _ in range(3):
        trainer.step(*crops, sample_ids=ids)
    machine.wait(world.device)
    warm, times = time.perf_counter() - begin, []
    for _ in range(steps):
        begin = time.perf_counter()
        trainer.step(*crops, sample_ids=ids)
        machine.wait(world.device)
        times.append(time.perf_counter() - begin)
    counts = (
        parts.count(lambda: trainer.step(*crops, sample_ids=ids))
        if not recipe.speed.compile
        else {"flops": None, "host_reads": None}
    )
    reserved = torch.cuda.max_memory_reserved() if world.device.type == "cuda" else None
    return {
        "images_per_second": recipe.train.batch_size / statistics.median(times),
        "times": times,
        "warm_up_seconds": warm,
        **counts,
        "syncs": syncs(trainer, crops, ids, world.device),
        "peak_memory": machine.peak_memory(world.device),
        "reserved_memory": reserved,
    }


def syncs(trainer, crops, ids, device) -> int | None:
    """How often one step makes the host wait for the GPU, as CUDA tells it."""
    import warnings

    import torch

    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step(*crops, sample_ids=ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def loader_alone(recipe, steps: int) -> dict:
    """img/s of the batches alone, copied to the device."""
    from maskwise import build
    from maskwise.bench import machine
    from maskwise.distributed.world import World
    from maskwise.engine.loop import prefetch

    world = World.start()
    batches = prefetch(build.stream(recipe, world, build.dataset(recipe), steps + 2, 0), world.device)
    next(batches)
    begin = time.perf_counter()
    for _ in range(steps):
        next(batches)
    machine.wait(world.device)
    return {
        "images_per_second": steps * recipe.train.batch_size / (time.perf_counter() - begin),
        "workers": build.workers(recipe, world),
    }


def end_to_end(recipe, steps: int) -> dict:
    """`maskwise bench train` of the same recipe."""
    from maskwise.bench import train

    words = [f"{key}={value}" for key, value in recipe.items()]
    return train.run(
        train.parser().parse_args(["pretrain/attmask_hint_vits16", *words, "--steps", str(steps), "--images", "8"])
    )


def attempt(call, *arguments) -> dict:
    """What a measurement gives, or why it gives nothing (no memory for that batch)."""
    import torch

    try:
        return call(*arguments)
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}


def measure(options) -> dict:
    """All measurements, JSON-able; each row is written as soon as it is there."""
    from maskwise.bench import machine, record
    from maskwise.distributed.world import World

    device = World.start().device
    result = {"record": record.describe(device), "matmul_rate": {}, "rows": []}
    import torch

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if device.type == "cuda" or name == "fp32":
            result["matmul_rate"][name] = machine.matmul_rate(device, dtype)
    for model in options.models:
        for batch in options.batches or BATCHES[model]:
            for compiled in (False, True) if not options.no_compile else (False,):
                for checkpointing in ("none", "blocks"):
                    recipe = recipe_for(model, batch, compiled, checkpointing, options.images, options.miniature)
                    row = {
                        "what": "synthetic",
                        "model": model,
                        "batch": batch,
                        "compile": compiled,
                        "checkpointing": checkpointing,
                    }
                    keep(result, {**row, **attempt(synthetic, recipe, options.steps)}, options.out)
        synthetics = [
            row
            for row in result["rows"]
            if row["model"] == model and row["what"] == "synthetic" and "images_per_second" in row
        ]
        if synthetics:
            best = max(synthetics, key=lambda row: row["images_per_second"])
            recipe = recipe_for(
                model, best["batch"], best["compile"], best["checkpointing"], options.images, options.miniature
            )
            row = {"model": model, **{key: best[key] for key in ("batch", "compile", "checkpointing")}}
            keep(result, {"what": "loader", **row, **loader_alone(recipe, options.steps)}, options.out)
            asked = {key: recipe.values[key] for key in recipe.origins if recipe.origins[key] == "command line"}
            asked = {
                key: "null" if value is None else str(value).lower() if isinstance(value, bool) else value
                for key, value in asked.items()
            }
            keep(result, {"what": "end to end", **row, **attempt(end_to_end, asked, options.steps)}, options.out)
    return result


def keep(result: dict, row: dict, out: str | None) -> None:
    """Add a row, and write all so far."""
    result["rows"].append(row)
    print(
        json.dumps(
            {
                key: row.get(key)
                for key in ("what", "model", "batch", "compile", "checkpointing", "images_per_second", "out_of_memory")
            }
        ),
        file=sys.stderr,
    )
    if out:
        from maskwise.bench import record

        record.write(out, result)


def markdown(result: dict) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| what | model | batch | compile | checkpointing | img/s | target | peak GiB | syncs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        speed = "out of memory" if row.get("out_of_memory") else f"{row['images_per_second']:.4g}"
        peak = f"{row['peak_memory'] / 2**30:.3g}" if row.get("peak_memory") else ""
        target = TARGETS[row["model"]] if row["what"] == "end to end" else ""
        cells = [
            row["what"],
            row["model"],
            row["batch"],
            "yes" if row["compile"] else "no",
            row["checkpointing"],
            speed,
            target,
            peak,
            row.get("syncs"),
        ]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", help="a folder of JPEGs (default: embedded images, which are not the ones the targets are for)"
    )
    parser.add_argument("--out", help="the JSON file to write")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, help="instead of each model's sweep")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--miniature", action="store_true", help="a tiny model, to see that the script works")
    options = parser.parse_args(words)
    print(markdown(measure(options)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

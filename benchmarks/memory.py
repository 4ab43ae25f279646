"""Bytes of a step by what they are for, with each option: `python -m benchmarks.memory [--batch 64] [--json FILE]`.

Counted on a CPU at two small batches, between which everything grows evenly, so that a GPU's need is known before there is one:
what autograd saves under bf16 autocast (activations, and bf16 copies of the weights), weights, gradients, moments, crops. What
lives inside one operation, and the allocator's spare room, come on top.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ssl"))

OPTIONS = {
    "none": ["speed.checkpointing=none"],
    "elementwise": ["speed.checkpointing=elementwise"],
    "blocks": ["speed.checkpointing=blocks"],
}


def measure(recipe: str, overrides: list[str], batch: int, counted: int) -> dict:
    """Bytes of a batch of `batch` images, from counts with `counted` and with twice as many."""
    from maskwise import build
    from maskwise.bench import machine, memory
    from maskwise.bench.contender import random_crops
    from maskwise.distributed.world import World
    from maskwise.recipe import read_recipe

    world, rows = World(), {}
    for name, words in OPTIONS.items():
        found = []
        for images in (counted, 2 * counted):
            made = read_recipe(recipe, f"train.batch_size={images}", "evaluate.knn_every=0", *words, *overrides)
            trainer = build.trainer(made, world, images=1000 * images, precision="bf16")
            found.append(memory.estimate(trainer, *random_crops(made, world.device)))
        small, large = found
        for accumulate in (1, 2, 4):
            row = {}
            for kind in ("activations", "crops", "weights", "gradients", "moments"):
                images = batch if kind == "crops" else batch / accumulate
                row[kind] = round(small[kind] + (large[kind] - small[kind]) * (images - counted) / counted)
            rows[f"{name}, accumulate {accumulate}"] = {**row, "total": sum(row.values())}
    return {"recipe": recipe, "overrides": overrides, "batch": batch, "counted": counted, "machine": machine.about(world.device), "rows": rows}


def main(words: list[str] | None = None) -> int:
    """Count, write, print."""
    from maskwise.bench.table import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="pretrain/attmask_hint_vits16")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--counted", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args(words)
    result = measure(options.recipe, options.overrides, options.batch, options.counted)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    kinds = list(next(iter(result["rows"].values())))
    print(f"GiB at batch {options.batch}, counted at {options.counted} and {2 * options.counted}")
    print(table([["options", *kinds], *([name, *(row[kind] / 2**30 for kind in kinds)] for name, row in result["rows"].items())]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

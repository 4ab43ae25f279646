"""Estimate the memory of a step by use and option: `python -m launch.reproduce.memory [--batch 64] [--json FILE]`.

Counted on a CPU at two small batches and extrapolated linearly: tensors that autograd saves under bf16 autocast
(activations, bf16 copies of the weights), weights, gradients, moments, crops. Temporary buffers of single operations
and the allocator's reserve are not included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ssl"))

OPTIONS = {
    "none": ["speed.checkpointing=none"],
    "elementwise": ["speed.checkpointing=elementwise"],
    "blocks": ["speed.checkpointing=blocks"],
}


def measure(recipe: str, overrides: list[str], batch: int, counted: int) -> dict:
    """Return bytes at batch size `batch`, extrapolated from `counted` and 2 `counted` images."""
    from maskwise import build
    from maskwise.bench import memory, record
    from maskwise.bench.implementation import random_crops
    from maskwise.distributed.world import World
    from maskwise.recipe.reading import read_recipe

    world, rows = World(), {}
    for name, words in OPTIONS.items():
        estimates = []
        for images in (counted, 2 * counted):
            made = read_recipe(recipe, f"train.batch_size={images}", "evaluate.knn_every=0", *words, *overrides)
            trainer = build.trainer(made, world, images=1000 * images, precision="bf16")
            estimates.append(memory.estimate(trainer, *random_crops(made, world.device)))
        small, large = estimates
        for accumulate in (1, 2, 4):
            row = {}
            for kind in ("activations", "crops", "weights", "gradients", "moments"):
                images = batch if kind == "crops" else batch / accumulate
                row[kind] = round(small[kind] + (large[kind] - small[kind]) * (images - counted) / counted)
            rows[f"{name}, accumulate {accumulate}"] = {**row, "total": sum(row.values())}
    return {
        "recipe": recipe,
        "overrides": overrides,
        "batch": batch,
        "counted": counted,
        "record": record.describe(world.device, seed=made.seed),
        "rows": rows,
    }


def main(words: list[str] | None = None) -> int:
    """Measure, write JSON, print a table."""
    from maskwise.bench import record
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
        record.write(options.json, result)
    kinds = list(next(iter(result["rows"].values())))
    print(f"GiB at batch {options.batch}, counted at {options.counted} and {2 * options.counted}")
    print(
        table(
            [
                ["options", *kinds],
                *([name, *(row[kind] / 2**30 for kind in kinds)] for name, row in result["rows"].items()),
            ]
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

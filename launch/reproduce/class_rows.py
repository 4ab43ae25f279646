"""Cost of a step with and without patch tokens after the last block that no loss reads.

`python -m launch.reproduce.class_rows --json docs/results/class_rows.json`. Both ways take turns in one process, on
random crops and one thread: products are counted (exact), CPU seconds are those of the process, so that other programs
on the machine disturb them less than wall time.
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

CASES = {
    "DINO, ViT-S/16": ("pretrain/dino_vits16", ()),
    "iBOT + AttMask-Hint, ViT-S/16": ("pretrain/attmask_hint_vits16", ()),
}
WAYS = ("whole block", "class token")


def trainer_of(recipe: str, words: tuple[str, ...], batch: int):
    """Build a recipe's trainer, and the crops and sample ids of its steps."""
    import torch

    from maskwise import build
    from maskwise.bench.implementation import random_crops
    from maskwise.distributed.world import World
    from maskwise.recipe.reading import read_recipe

    overrides = [*words, f"train.batch_size={batch}", "evaluate.knn_every=0", "optimizer.warmup_epochs=0"]
    made = read_recipe(recipe, *overrides, try_model=False)
    trainer = build.trainer(made, World(device=torch.device("cpu")), images=1000 * batch)
    return trainer, [*random_crops(made, torch.device("cpu")), torch.arange(batch)], overrides


def choose(trainer, way: str) -> None:
    """Make the encoders compute the whole last block, or what the losses read of it."""
    for network in (trainer.method.student, trainer.method.teacher):
        network.encoder.pooling.reads_patches = way == "whole block"


def measure(recipe: str, words: tuple[str, ...], batch: int, turns: int) -> dict:
    """Count the products of a step each way, and time steps in turns."""
    from maskwise.bench import parts

    trainer, (global_crops, local_crops, ids), overrides = trainer_of(recipe, words, batch)
    local_crops = local_crops if len(local_crops) else None

    def step():
        return trainer.step(global_crops, local_crops, sample_ids=ids)

    step()
    flops, seconds = {}, {way: [] for way in WAYS}
    for way in WAYS:
        choose(trainer, way)
        flops[way] = parts.count(step)["flops"]
    for turn in range(turns):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            choose(trainer, way)
            begin = time.process_time()
            step()
            seconds[way].append(time.process_time() - begin)
    whole, rows = WAYS
    shares = [1 - a / b for a, b in zip(seconds[rows], seconds[whole])]
    return {
        "recipe": recipe,
        "overrides": overrides,
        "batch": batch,
        "flops": flops,
        "flops_saved": 1 - flops[rows] / flops[whole],
        "cpu_seconds": seconds,
        "cpu_seconds_saved": statistics.median(shares),
        "cpu_seconds_saved_by_turn": shares,
    }


def main(words: list[str] | None = None) -> int:
    """Measure all cases, print them and write the file."""
    import torch

    from maskwise.bench import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="changes to the recipes")
    parser.add_argument("--json", help="the file to write")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    result: dict = {"record": record.describe(seed=0), "cases": {}}
    for name in options.cases:
        recipe, changes = CASES[name]
        case = measure(recipe, (*changes, *options.set), options.batch, options.turns)
        result["cases"][name] = case
        print(json.dumps({"case": name, **{key: case[key] for key in ("flops_saved", "cpu_seconds_saved")}}))
    if options.json:
        record.write(options.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

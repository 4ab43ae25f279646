"""Time training steps of CNNs in channels-last and in contiguous memory.

    python -m launch.reproduce.channels_last [--steps 5] [--threads 1] --json docs/results/channels_last.json

Both start from the same weights and take the same crops in turns, in one process; loading is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from maskwise import build
from maskwise.bench import record
from maskwise.bench.machine import wait
from maskwise.distributed.world import World
from maskwise.recipe.reading import read_recipe

RECIPE = "pretrain/cifar10_dino"
COMMON = (
    "data.name=shapes",
    "data.count=256",
    "train.batch_size=16",
    "evaluate.knn_every=0",
    "optimizer.warmup_epochs=0",
)
AT_96 = ("data.size=96", "crops.global_size=96", "crops.local_size=48", "backbone.image_size=96")
CASES = {
    "ResNet-18 of half width, 48 px": ("data.size=48",),
    "ResNet-50, 96 px": ("backbone=resnet50", *AT_96),
    "ConvNeXt-atto, 96 px": ("backbone=convnext_atto", *AT_96),
    "EfficientNet-B0, 96 px": ("backbone=efficientnet_b0", *AT_96),
    "MobileNetV3-large, 96 px": ("backbone=mobilenetv3_large_100", *AT_96),
}
CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"


def trainers(recipe, world) -> dict:
    """Return two trainers with the same weights, one of them in contiguous memory."""
    both = {name: build.trainer(recipe, world) for name in (CHANNELS_LAST, CONTIGUOUS)}
    for network in (both[CONTIGUOUS].method.student, both[CONTIGUOUS].method.teacher):
        network.encoder.backbone.channels_last = False
        network.to(memory_format=torch.contiguous_format)
    return both


def measure(words: tuple[str, ...], steps: int, world) -> dict:
    """Time steps of one network in both layouts, in turns -> seconds by layout and their ratio."""
    recipe = read_recipe(RECIPE, *COMMON, *words)
    both, data = trainers(recipe, world), build.dataset(recipe)
    stream = build.stream(recipe, world, data, steps + 1, 0)
    augment = build.inputs(recipe, both[CHANNELS_LAST])
    wall: dict[str, list[float]] = {name: [] for name in both}
    cpu: dict[str, list[float]] = {name: [] for name in both}
    losses = {}
    for number, batch in zip(range(steps + 1), stream):  # the first step is not counted
        crops = augment(batch.to(world.device))
        for name in both if number % 2 == 0 else reversed(both):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            found = both[name].step(*crops, sample_ids=batch.index)
            wait(world.device)
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
            losses.setdefault(name, float(found["loss"]))
    medians = {name: statistics.median(times[1:]) for name, times in cpu.items()}
    return {
        "words": list(words),
        "precision": both[CHANNELS_LAST].precision,
        "first_loss": losses,
        "wall_seconds": {name: times[1:] for name, times in wall.items()},
        "cpu_seconds": {name: times[1:] for name, times in cpu.items()},
        "median_cpu_seconds": medians,
        "ratio": medians[CONTIGUOUS] / medians[CHANNELS_LAST],
    }


def main(words: list[str] | None = None) -> int:
    """Measure all networks and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each layout (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, metavar="NETWORK")
    parser.add_argument("--json", metavar="FILE", required=True)
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    world = World.start()
    about = record.describe(world.device, seed=read_recipe(RECIPE).seed)
    networks = {}
    for name in given.only:
        networks[name] = found = measure(CASES[name], given.steps, world)
        print(f"{name}: channels-last {found['ratio']:.2f} times as fast ({found['precision']})", flush=True)
        record.write(given.json, {"record": about, "steps": given.steps, "networks": networks})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Steps of a recipe on random crops, compiled or not: speed, memory, host waits."""

from __future__ import annotations

import statistics
import time
import warnings

BACKBONES = {
    "vits16": ("attmask/100pct_hint", "backbone.name=vit_small_patch16_224"),
    "vitb16": ("attmask/100pct_hint", "backbone.name=vit_base_patch16_224"),
    "vitl16": ("attmask/100pct_hint", "backbone.name=vit_large_patch16_224"),
    "resnet50": ("dino/resnet50_100ep",),
}
BATCHES = {"vits16": 128, "vitb16": 64, "vitl16": 32, "resnet50": 64}
HEAD = ("head.hidden=64", "head.bottleneck=16", "head.prototypes=64")
CROPS = ("crops.global_size=64", "crops.local_size=32", "crops.local_number=2")
SMALL_VIT = ("backbone.embed_dim=48", "backbone.depth=2", "backbone.num_heads=3", "backbone.drop_path=0")
SMALL = {
    **dict.fromkeys(("vits16", "vitb16", "vitl16"), (*SMALL_VIT, *HEAD, *CROPS)),
    "resnet50": ("backbone.layers=[1, 1, 1, 1]", "backbone.channels=[8, 8, 8, 16]", *HEAD, *CROPS),
}


def recipe_of(model: str, miniature: bool, *changes: str, data: tuple[str, ...] = ("data=shapes", "data.count=64")):
    """Return the recipe of a row of BACKBONES on images given by `data`: 2x224 + 10x96 crops, or tiny ones."""
    from maskwise.recipe.reading import read_recipe

    name, *words = BACKBONES[model]
    batch = 2 if miniature else BATCHES[model]
    words += [f"train.batch_size={batch}", "evaluate.knn_every=0", "train.epochs=100", *data]
    if model != "resnet50":
        words += ["crops.global_size=224", "crops.local_size=96", "crops.local_number=10", "head.prototypes=8192"]
    return read_recipe(name, *words, *(SMALL[model] if miniature else ()), *changes)


def trainer_of(recipe, device):
    """Build the trainer of a recipe, and the crops and sample ids of its steps."""
    import torch

    from maskwise import build
    from maskwise.bench.implementation import random_crops
    from maskwise.distributed.world import World

    batch = recipe.train.batch_size
    trainer = build.trainer(recipe, World(device=device), images=1000 * batch)
    global_crops, local_crops = random_crops(recipe, device)
    return trainer, (global_crops, local_crops if len(local_crops) else None, torch.arange(batch))


def timed(trainer, inputs, steps: int, warm_up: int = 3) -> dict:
    """Time single steps after a warm-up: seconds of each, images per second by their median, peak memory."""
    import torch

    from maskwise.bench import machine

    device = trainer.world.device
    begin = time.perf_counter()
    for _ in range(warm_up):
        trainer.step(*inputs)
    machine.wait(device)
    warm, times = time.perf_counter() - begin, []
    for _ in range(steps):
        begin = time.perf_counter()
        trainer.step(*inputs)
        machine.wait(device)
        times.append(time.perf_counter() - begin)
    on_gpu = device.type == "cuda"
    return {
        "images_per_second": len(inputs[2]) / statistics.median(times),
        "times": times,
        "warm_up_seconds": warm,
        "precision": trainer.precision,
        "peak_memory": machine.peak_memory(device),
        "reserved_memory": torch.cuda.max_memory_reserved() if on_gpu else None,
    }


def waits(trainer, inputs) -> int | None:
    """Count how often one step makes the host wait for the GPU, as CUDA reports it; None on a CPU."""
    import torch

    if trainer.world.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(model: str, compiled: bool, settings) -> dict:
    """Measure steps of a model; operations are counted where it is not compiled."""
    from maskwise.bench import parts

    device = settings.torch_device()
    changes = [f"speed.compile={str(compiled).lower()}"] if model != "resnet50" else []
    recipe = recipe_of(model, settings.miniature, *changes)
    trainer, inputs = trainer_of(recipe, device)
    steps = 2 if settings.miniature else 20
    result = {"model": model, "batch": recipe.train.batch_size, "compile": compiled, **timed(trainer, inputs, steps)}
    result["host_waits"] = waits(trainer, inputs)
    if not compiled:
        result.update(parts.count(lambda: trainer.step(*inputs)))
    return result

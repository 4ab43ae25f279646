"""Measure time and memory of a recipe's own training steps, with batches that grow up to its batch size."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import torch

from maskwise import build
from maskwise.bench.machine import wait
from maskwise.data import loader
from maskwise.data.batch import Batch
from maskwise.distributed.world import World
from maskwise.doctor.bottleneck import inputs_to_shrink
from maskwise.doctor.machine import GIB, Peak, free_memory
from maskwise.errors import UserError
from maskwise.recipe.consistency import fitted
from maskwise.recipe.recipe import Recipe

IMAGENET, CLASSES = 1_281_167, 1000  # assumed where the recipe's images are missing
STEPS = 3  # per batch size; the first warms up
MARGIN = 0.7  # share of the free memory that the measurement itself may use


@dataclass(frozen=True)
class Measurement:
    """Measured per rank: seconds of a step and of loading its batch, peak memory in bytes.

    batch: the recipe's batch size on this rank; tried: the largest that was run; where they differ, time and memory
    are extrapolated linearly. loading: None where no images could be opened, for the given reason. steps: batch size ->
    (seconds of a step, seconds of loading, peak bytes).
    """

    batch: int
    tried: int
    step: float
    loading: float | None
    memory: int
    workers: int
    images: int
    reason: str = ""
    steps: dict = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Expected images per second: workers load in parallel with the step; without them loading comes first."""
        loading = self.loading or 0.0
        return self.batch / (max(self.step, loading) if self.workers else self.step + loading)

    @property
    def waiting(self) -> float:
        """Expected share of the time spent waiting for data; 0 where no images could be loaded."""
        loading = self.loading or 0.0
        idle = max(0.0, loading - self.step) if self.workers else loading
        return idle * self.rate / self.batch


def measure(recipe: Recipe, seconds: float = 10.0, world: World | None = None) -> Measurement:
    """Run the recipe's own step on its own batches for about `seconds`, starting with two images.

    The batch is doubled while time and memory allow. Nothing is written. Raises UserError if the model cannot be built
    or two images do not fit into memory.
    """
    world = world or World()
    reason, images = "", None
    try:
        images = build.dataset(recipe)
    except UserError as error:
        reason = str(error)
    count = len(images) if images is not None else IMAGENET
    recipe = fitted(recipe, count, 1)
    share = max(1, recipe.train.batch_size // world.size)
    sizes = measured_sizes(recipe, images, count, share, seconds, world)
    tried = max(sizes)
    step, loading, memory = sizes[tried]
    more = share - tried
    if more:
        step = step + max(0.0, growth(sizes, 0)) * more if len(sizes) > 1 else step * share / tried
        loading = None if loading is None else loading * share / tried
        memory = int(memory + max(0.0, growth(sizes, 2)) * more)
    workers = build.workers(recipe, world)
    return Measurement(share, tried, step, loading, memory, workers, count, reason, sizes)


def measured_sizes(recipe: Recipe, images, count: int, share: int, seconds: float, world: World) -> dict:
    """Measure growing batch sizes up to `share` -> {size: (seconds of a step, seconds of loading, peak bytes)}."""
    peak = Peak(world.device)
    classes = CLASSES if images is None and recipe.learns_labels else None
    trainer = build.trainer(recipe, world, images=count, classes=classes)
    inputs = build.inputs(recipe, trainer)
    sizes: dict[int, tuple] = {}
    start, size = time.perf_counter(), min(2, share)
    while True:
        try:
            if images is None:
                batch, loading = noise(recipe, size, trainer.method.teacher.encoder), None
            else:
                batch, loading = load_batches(recipe, images, size, seconds / 4, build.workers(recipe, world))
            step = step_seconds(trainer, inputs, batch.to(world.device), world.device)
        except torch.OutOfMemoryError:
            if not sizes:
                raise UserError(
                    f"{size} images of this recipe do not fit into the {free_memory(world.device) / GIB:.1f} GiB of "
                    f"free memory; choose a smaller backbone, or {inputs_to_shrink(recipe.learns_labels)}"
                ) from None
            return sizes
        sizes[size] = (step, loading, peak.bytes)
        left = seconds - (time.perf_counter() - start)
        size = next_size(sizes, share, left, world.device)
        if size is None:
            return sizes


def next_size(sizes: dict, share: int, left: float, device: torch.device) -> int | None:
    """The next batch size for the seconds left; None to stop. At least two are measured, to extrapolate."""
    size = max(sizes)
    if size == share:
        return None
    step, loading, _ = sizes[size]
    factor = left / (STEPS * (step + (loading or 0)))
    if factor < 2 and len(sizes) > 1:
        return None
    larger = min(share, size * max(2, min(8, int(factor))))
    if len(sizes) > 1 and growth(sizes, 2) * (larger - size) > MARGIN * free_memory(device):
        return None
    return larger


def growth(sizes: dict, place: int) -> float:
    """Increase of column `place` per image, from the two largest batches."""
    if len(sizes) < 2:
        return 0.0
    small, large = sorted(sizes)[-2:]
    return (sizes[large][place] - sizes[small][place]) / (large - small)


def load_batches(recipe: Recipe, images, size: int, limit: float, workers: int) -> tuple[Batch, float]:
    """Return a batch of the recipe's loader, and the seconds per batch once the loader has warmed up.

    Images are decoded as in the first epoch of a run, without a cache.
    """
    stream = loader.batches(
        images,
        build.views(recipe),
        repeats=recipe.augment.repeats,
        batch_size=size,
        seed=recipe.seed,
        total_steps=10_000,
        workers=workers,
        cache="none",
        corrupt_share=1.0,
        decoder=recipe.data.decoder,
        jpeg_scaling=recipe.data.jpeg_scaling,
    )
    with contextlib.closing(stream):
        batch = next(stream)
        start, taken = time.perf_counter(), 0
        while taken < 2 or time.perf_counter() - start < min(0.5, limit) and taken < 50:
            batch = next(stream)
            taken += 1
            if time.perf_counter() - start > limit:
                break
        return batch, (time.perf_counter() - start) / taken


def noise(recipe: Recipe, size: int, encoder) -> Batch:
    """A batch of random pixels with the recipe's views."""
    crops = build.views(recipe)
    pictures = [
        torch.randint(
            0, 256, (len(encoder.mean), 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(k)
        )
        for k in range(size)
    ]
    first, local, params = crops.batch(pictures, list(range(size)), 0)
    return Batch(first, local, params, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def step_seconds(trainer, inputs, batch: Batch, device: torch.device) -> float:
    """Seconds of a training step, color included: the faster of two after a warm-up step."""
    times = []
    for _ in range(STEPS):
        wait(device)
        start = time.perf_counter()
        trainer.step(*inputs(batch), sample_ids=batch.index)
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])

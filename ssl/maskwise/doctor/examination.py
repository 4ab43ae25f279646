"""Real steps of a recipe, a few, growing towards its batch: what one costs in time and memory."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import torch

from maskwise import build
from maskwise.data import loader
from maskwise.data.batch import Batch
from maskwise.distributed.world import World
from maskwise.doctor.machine import GIB, Peak, free_memory
from maskwise.functional.errors import UserError
from maskwise.recipe import Recipe, check_run

IMAGENET, CLASSES = 1_281_167, 1000  # images and their classes, where there are none to count
STEPS = 3  # of each size; the first warms up
MARGIN = 0.7  # of the free memory that the examination itself may take


@dataclass(frozen=True)
class Finding:
    """What was measured, per rank: seconds of a step and of loading its batch, bytes at the peak.

    `batch` is the recipe's batch on this rank and `tried` the largest that was really run; where they differ time and
    memory are continued in a straight line. `loading` is None where there were no images to load, `reason` says why.
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
        """Images a second that a run should show: workers load beside the step, without them loading comes before it."""
        loading = self.loading or 0.0
        return self.batch / (max(self.step, loading) if self.workers else self.step + loading)

    @property
    def bound(self) -> str:
        """`data-bound`, `compute-bound`, or `unknown` where nothing could be loaded."""
        if self.loading is None:
            return "unknown"
        return "data-bound" if self.loading > self.step else "compute-bound"


def examine(recipe: Recipe, seconds: float = 10.0, world: World | None = None) -> Finding:
    """Run the recipe's own step on its own batches for about so many seconds, beginning with two images.

    The batch is doubled while time and memory allow. Nothing is written. Raises UserError where the recipe's model
    cannot be built or not even two images fit into memory.
    """
    world = world or World()
    reason, images = "", None
    try:
        images = build.dataset(recipe)
    except UserError as error:
        reason = str(error)
    count = len(images) if images is not None else IMAGENET
    check_run(recipe, count, 1)
    share = max(1, recipe.train.batch_size // world.size)
    peak = Peak(world.device)
    running = build.trainer(recipe, world, images=count, classes=None if images is not None or not recipe.learns_labels else CLASSES)
    encoder, inputs = running.method.teacher.encoder, build.inputs(recipe, running)
    sizes = {}
    start, size = time.perf_counter(), min(2, share)
    while True:
        try:
            batch, loading = loaded(recipe, images, size, seconds / 4, build.workers(recipe, world)) if images is not None else (noise(recipe, size, encoder), None)
            spent = stepped(running, inputs, batch.to(world.device), world.device)
        except torch.OutOfMemoryError:
            if not sizes:
                raise UserError(f"not even {size} images of this recipe fit into the {free_memory(world.device) / GIB:.1f} GiB that are free; choose a smaller backbone or smaller crops") from None
            break
        sizes[size] = (spent, loading, peak.bytes)
        if size == share:
            break
        # as far as the time left reaches, but one more size in any case: a line needs two points
        left = seconds - (time.perf_counter() - start)
        factor = left / (STEPS * (spent + (loading or 0)))
        if factor < 2 and len(sizes) > 1:
            break
        grown = min(share, size * max(2, min(8, int(factor))))
        if len(sizes) > 1 and growth(sizes, 2) * (grown - size) > MARGIN * free_memory(world.device):
            break
        size = grown
    tried = max(sizes)
    spent, loading, memory = sizes[tried]
    more = share - tried
    if more:
        spent = spent + max(0.0, growth(sizes, 0)) * more if len(sizes) > 1 else spent * share / tried
        loading = None if loading is None else loading * share / tried
        memory = int(memory + max(0.0, growth(sizes, 2)) * more)
    return Finding(share, tried, spent, loading, memory, build.workers(recipe, world), count, reason, sizes)


def growth(sizes: dict, place: int) -> float:
    """What one more image adds, from the two largest batches that ran."""
    if len(sizes) < 2:
        return 0.0
    small, large = sorted(sizes)[-2:]
    return (sizes[large][place] - sizes[small][place]) / (large - small)


def loaded(recipe: Recipe, images, size: int, limit: float, workers: int) -> tuple[Batch, float]:
    """A batch of the recipe's loader, and the seconds that one takes once the loader has warmed up.

    Images are decoded as in a run's first epoch: nothing is remembered from a batch to the next.
    """
    stream = loader.batches(
        images, build.views(recipe), repeats=recipe.augment.repeats, batch_size=size, seed=recipe.seed, total_steps=10_000,
        workers=workers, cache="none", corrupt_share=1.0, decoder=recipe.data.decoder, jpeg_scaling=recipe.data.jpeg_scaling,
    )  # fmt: skip
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
    """A batch of random pixels with the recipe's own views, where there are no images."""
    crops = build.views(recipe)
    pictures = [torch.randint(0, 256, (len(encoder.mean), 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(k)) for k in range(size)]
    first, local, params = crops.batch(pictures, list(range(size)), 0)
    return Batch(first, local, params, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def stepped(running, inputs, batch: Batch, device: torch.device) -> float:
    """Seconds of a step as a run does it, colour included: the better of two after one that warms up."""
    times = []
    for _ in range(STEPS):
        finished(device)
        start = time.perf_counter()
        running.step(*inputs(batch), sample_ids=batch.index)
        finished(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def finished(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Load the batches of a whole run; each is a pure function of (seed, step, rank), independent of the workers."""

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from maskwise.data.batch import Batch
from maskwise.data.decoding import jpeg
from maskwise.data.options import ReadOptions
from maskwise.data.reader import DecodedDataset, NoReadableImages, Reader, cached_if_small
from maskwise.data.shared_memory import BufferAllocator, BufferPool, SharedBatch
from maskwise.data.worker import Items, start_worker
from maskwise.errors import UserError
from maskwise.functional import keyed_random

LARGE_BATCH = 1 << 28  # bytes of crops above which each worker prefetches one batch, not two
IN_USE = 3  # batches outside the workers' queue: one in the step, one being copied ahead, one for a picture


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Count the whole batches of an epoch of `count` images; the remainder is dropped."""
    return count // batch_size


def epoch_order(seed: int, epoch: int, count: int, batch_size: int, repeats: int = 1) -> torch.Tensor:
    """Order the samples of an epoch -> int64; with repeats, copy k of image i is sample i + k * count.

    A repeated epoch covers count / repeats images, all copies of an image in one batch (Hoffer et al. 2020; timm's
    RepeatAugSampler). Copies lie half a batch apart, so that mixup never pairs an image with its own copy.
    """
    order = keyed_random.order(seed, epoch, count)
    if repeats == 1:
        return order
    samples = (order[:, None] + count * torch.arange(repeats)).flatten()
    samples = samples[: steps_per_epoch(count, batch_size) * batch_size]
    return samples if batch_size % 2 else samples.view(-1, 2, batch_size // 2).transpose(1, 2).flatten()


def check_batch_size(batch_size: int, count: int, world_size: int) -> None:
    """Raise UserError for a global batch that `count` images cannot fill or `world_size` ranks cannot share evenly."""
    if batch_size < 1:
        raise UserError(f"train.batch_size is {batch_size}; it must be at least 1")
    if batch_size > count:
        largest = max(world_size, count // world_size * world_size)
        available = "is only one image" if count == 1 else f"are only {count} images"
        raise UserError(
            f"train.batch_size is {batch_size} and there {available}; "
            f"give train.batch_size={largest} or less, or more images"
        )
    if batch_size % world_size:
        near = max(world_size, batch_size // world_size * world_size)
        raise UserError(
            f"train.batch_size {batch_size} (the global batch) does not divide over {world_size} ranks; "
            f"give train.batch_size={near}, or to continue a run a number of ranks that divides {batch_size}"
        )


def batches(
    dataset,
    multicrop,
    *,
    batch_size: int,
    total_steps: int,
    start_step: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    repeats: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    **read_options,
) -> "Batches":
    """Iterate over this rank's `Batch` of every step in [start_step, total_steps).

    batch_size is global: step s takes order(seed, epoch)[s*B : (s+1)*B] of its epoch and rank r the r-th part of it.
    repeats: copies of each image in a batch (`epoch_order`). The workers live for the whole run. An unreadable image is
    replaced by the next readable one and reported. read_options: the fields of `ReadOptions`.
    Raises UserError for a decoder that does not work on this machine and for an impossible batch size.
    """
    check_batch_size(batch_size, len(dataset), world_size)
    reading = ReadOptions(**read_options)
    dataset = DecodedDataset(dataset, jpeg.resolve_decoder(reading.decoder))
    if reading.cache == "auto" and not reading.jpeg_scaling:
        dataset = cached_if_small(dataset, processes=max(1, workers))
    share = RankShare(seed, batch_size, rank, world_size, repeats)
    order, pool, prefetch = range(start_step, total_steps), None, None
    if workers:
        size = dataset.bytes_per_pixel * multicrop.pixels * share.images
        prefetch = 1 if size > LARGE_BATCH else 2
        pool = BufferPool(min(workers * prefetch + IN_USE, max(1, len(order))), size)
    loader = DataLoader(
        StepDataset(dataset, multicrop, share, reading.jpeg_scaling, pool),
        batch_size=None,
        sampler=StepSampler(order, pool),
        num_workers=workers,
        collate_fn=identity,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
        prefetch_factor=prefetch,
    )
    return Batches(loader, len(dataset), reading.corrupt_share, pool)


class Batches:
    """Iterate over batches and account for unreadable files.

    .corrupt: name -> reason of each; .seen: images read so far by this rank; .replaced: how many of them were replaced;
    .count: images of the dataset; .ceiling: accepted share of unreadable images.
    """

    def __init__(self, loader: DataLoader, count: int, corrupt_share: float, pool: BufferPool | None = None):
        self.corrupt: dict[str, str] = {}
        self.seen = 0
        self.replaced = 0
        self.count, self.ceiling = count, corrupt_share
        self._length, self._iterator = len(loader), Items(loader)
        self._pool = pool  # batches refer to it by key: it has to live as long as they are read

    def __iter__(self):
        return self

    def __len__(self) -> int:
        """Count the batches of the whole iteration."""
        return self._length

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        if isinstance(batch, SharedBatch):
            batch = batch.unpack()
        if isinstance(batch, UserError):
            self.corrupt.update(batch.corrupt if isinstance(batch, NoReadableImages) else {})
            self.close()
            raise batch
        self.seen += len(batch)
        self.replaced += batch.replaced
        self.corrupt.update(batch.corrupt)
        return batch

    def close(self) -> None:
        """End the workers."""
        self._iterator = iter(())


class StepSampler:
    """Yield the steps in order, each with the number of a free buffer, or None without one."""

    def __init__(self, order: range, pool: BufferPool | None):
        self.order, self.pool = order, pool

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self):
        for step in self.order:
            yield step, None if self.pool is None else self.pool.take()


@dataclass(frozen=True)
class RankShare:
    """Select the samples of one rank: seed of the order, global batch size, rank, ranks, copies of each image."""

    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    repeats: int = 1

    @property
    def images(self) -> int:
        """Count the images of a batch on this rank."""
        return self.batch_size // self.world_size


class StepDataset(Dataset):
    """Map (step, buffer) to this rank's Batch of that step; a worker returns a SharedBatch."""

    def __init__(self, dataset, multicrop, share: RankShare, jpeg_scaling: bool, pool: BufferPool | None):
        self.dataset, self.multicrop = dataset, multicrop
        self.share, self.jpeg_scaling = share, jpeg_scaling
        # Not the pool itself: a worker that is spawned, not forked, gets the shared buffers only.
        self.buffers, self.pool_key = ([], -1) if pool is None else (pool.buffers, pool.key)
        self._order = (None, None)

    def __getitem__(self, item: tuple[int, int | None]) -> "Batch | SharedBatch | UserError":
        step, buffer = item
        epoch, index = self._samples(step)
        reader = Reader(self.dataset, self._shrink_factor(index, epoch) if self.jpeg_scaling else None)
        empty = torch.empty if buffer is None else BufferAllocator(self.buffers[buffer])
        rows = (index % len(self.dataset)).tolist()
        try:
            self.dataset.expect(rows)
            images = map(reader, range(len(index)), rows)
            global_crops, local_crops, params = self.multicrop.batch(images, index, epoch, empty)
        except UserError as error:  # returned as a value: an exception in a worker would arrive as a traceback
            return error
        labels = self.dataset.labels
        labels = None if labels is None else labels[torch.tensor(reader.read)]
        batch = Batch(global_crops, local_crops, params, labels, index, reader.corrupt, reader.replaced, step)
        if get_worker_info() is None:
            return batch
        return SharedBatch.of(batch, self.pool_key, None if buffer is None or empty.overflowed else buffer)

    def _samples(self, step: int) -> tuple[int, torch.Tensor]:
        """Return the epoch of a step and the sample ids int64 [B] of this rank."""
        share, count = self.share, len(self.dataset)
        epoch, place = divmod(step, steps_per_epoch(count, share.batch_size))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(share.seed, epoch, count, share.batch_size, share.repeats))
        first = place * share.batch_size + share.rank * share.images
        return epoch, self._order[1][first : first + share.images].clone()

    def _shrink_factor(self, index: torch.Tensor, epoch: int):
        uniforms = self.multicrop.sample_uniforms(index, epoch)

        def shrink_factor(place: int, height: int, width: int) -> int:
            boxes, _ = self.multicrop.boxes(uniforms[place : place + 1], [(height, width)])
            return self.multicrop.shrink_factor(boxes[0])

        return shrink_factor


def identity(item):
    """Return the item: a collate function for items that are batches already."""
    return item

"""Batches of a whole run; each is a pure function of (seed, step, world), whatever computes it."""

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from maskwise.data import decoders
from maskwise.data.batch import Batch
from maskwise.data.reader import Decoded, NoneReadable, Reader, remembered
from maskwise.data.slots import Packed, Room, Slots
from maskwise.data.worker import start_worker
from maskwise.functional import draws
from maskwise.functional.errors import UserError

LARGE_BATCH = 1 << 28  # bytes of crops from which on each worker prepares one batch ahead, not two
IN_USE = 3  # batches outside the workers' queue: one in the step, one copied ahead, one for a picture


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in one pass over `count` images; what is left over waits for the next epoch's order."""
    return count // batch_size


def epoch_order(seed: int, epoch: int, count: int, batch_size: int, repeats: int = 1) -> torch.Tensor:
    """The samples of an epoch in the order of its batches -> int64; with repeats copy k of image i is the sample i + k * count.

    A repeated epoch sees count / repeats images, the copies of one in the same batch (Hoffer et al. 2020; timm's sampler), and neighbours
    in a batch, which mixing pairs, are places half a batch apart, so that no copy meets its like.
    """
    order = draws.order(seed, epoch, count)
    if repeats == 1:
        return order
    samples = (order[:, None] + count * torch.arange(repeats)).flatten()[:steps_per_epoch(count, batch_size) * batch_size]
    return samples if batch_size % 2 else samples.view(-1, 2, batch_size // 2).transpose(1, 2).flatten()


def batches(dataset, multicrop, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
            start_step: int = 0, total_steps: int, workers: int = 0, pin_memory: bool = False, repeats: int = 1,
            cache: str = "auto", corrupt_share: float = 0.01, decoder: str = "auto", jpeg_scaling: bool = False) -> "Batches":
    """Iterate over this rank's `Batch` of every step in [start_step, total_steps).

    batch_size is that of all ranks together: step s takes order(seed, epoch)[s*B : (s+1)*B] of its epoch and rank
    r the r-th part of it; `repeats` takes each image so often (`epoch_order`). One set of workers lives for the whole run. An unreadable
    image is replaced by the next readable one and reported; `corrupt_share` is for whoever judges how many are too many (engine/bad_images.py).
    cache: "auto" keeps decoded images in memory where all processes together need less than 1 GiB, "none" never.
    decoder: of JPEGs (`decoders.NAMES`). jpeg_scaling: decode a JPEG at 1/2, 1/4 or 1/8 of its size where every view of
    it is still made smaller after that; nothing is kept in memory then.
    Raises UserError for a decoder that does not work here, and for a batch that the data cannot fill or the ranks cannot share.
    """
    count = len(dataset)
    if batch_size < 1:
        raise UserError(f"train.batch_size is {batch_size}; it must be at least 1")
    if batch_size > count:
        raise UserError(f"train.batch_size is {batch_size} but the data has {count} images; "
                        f"set train.batch_size={count} or less")
    if batch_size % world_size:
        raise UserError(f"train.batch_size is {batch_size}, which {world_size} ranks cannot share evenly; "
                        f"set train.batch_size={max(1, batch_size // world_size) * world_size}")
    decoder = decoders.resolved(decoder)
    dataset = Decoded(dataset, decoder)
    if cache == "auto" and not jpeg_scaling:
        dataset = remembered(dataset, processes=max(1, workers))
    steps = Steps(dataset, multicrop, batch_size, rank, world_size, seed, jpeg_scaling, repeats)
    return Batches(steps, range(start_step, total_steps), workers, pin_memory, corrupt_share)


class Batches:
    """Iterator over batches with an account of the files that could not be read.

    .corrupt: name -> reason of each; .seen: images asked for so far, by this rank; .replaced: how many of them were replaced;
    .count: images of the set; .ceiling: the share of it that may be unreadable.
    """

    def __init__(self, steps: "Steps", order: range, workers: int, pin_memory: bool, corrupt_share: float):
        self.corrupt: dict[str, str] = {}
        self.seen = 0
        self.replaced = 0
        self.count, self.ceiling = len(steps.dataset), corrupt_share
        self._length = len(order)
        self._slots, options = None, {}
        if workers:
            size = steps.bytes_per_batch()
            ahead = 1 if size > LARGE_BATCH else 2
            self._slots = Slots(min(workers * ahead + IN_USE, max(1, len(order))), size)
            steps.buffers, steps.key, options = self._slots.buffers, self._slots.key, {"prefetch_factor": ahead}
        loader = DataLoader(steps, batch_size=None, sampler=Dispatch(order, self._slots), num_workers=workers, collate_fn=unchanged,
                            pin_memory=pin_memory, worker_init_fn=start_worker, generator=torch.Generator(), **options)
        self._iterator = iter(loader)

    def __iter__(self):
        return self

    def __len__(self) -> int:
        """Batches of the whole iteration."""
        return self._length

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        if isinstance(batch, Packed):
            batch = batch.unpacked()
        if isinstance(batch, UserError):
            self.corrupt.update(batch.corrupt if isinstance(batch, NoneReadable) else {})
            self.close()
            raise batch
        self.seen += len(batch)
        self.replaced += batch.replaced
        self.corrupt.update(batch.corrupt)
        return batch

    def close(self) -> None:
        """Let the workers go."""
        self._iterator = iter(())


class Dispatch:
    """The steps in order, each with the slot that its batch is to be written into (None: none is free, or none is needed)."""

    def __init__(self, order: range, slots: Slots | None):
        self.order, self.slots = order, slots

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self):
        for step in self.order:
            yield step, None if self.slots is None else self.slots.take()


class Steps(Dataset):
    """(step, slot) -> this rank's Batch of that step; from a worker, Packed."""

    buffers: list[torch.Tensor] = []
    key = -1

    def __init__(self, dataset, multicrop, batch_size: int, rank: int, world_size: int, seed: int, jpeg_scaling: bool = False, repeats: int = 1):
        self.dataset, self.multicrop, self.jpeg_scaling, self.repeats = dataset, multicrop, jpeg_scaling, repeats
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self._order = (None, None)

    def bytes_per_batch(self) -> int:
        """Bytes of the crops of one batch of this rank."""
        return 3 * self.multicrop.pixels * self.batch_size // self.world_size

    def __getitem__(self, item: tuple[int, int | None]) -> "Batch | Packed | UserError":
        step, slot = item
        epoch, place = divmod(step, steps_per_epoch(len(self.dataset), self.batch_size))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.dataset), self.batch_size, self.repeats))
        share = self.batch_size // self.world_size
        first = place * self.batch_size + self.rank * share
        index = self._order[1][first:first + share].clone()
        reader = Reader(self.dataset, self._shrink(index, epoch) if self.jpeg_scaling else None)
        empty = torch.empty if slot is None else Room(self.buffers[slot])
        try:
            images = map(reader, range(share), (index % len(self.dataset)).tolist())
            global_crops, local_crops, params = self.multicrop.batch(images, index, epoch, empty)
        except UserError as error:  # handed over as a value: a worker's exception would arrive as a traceback
            return error
        labels = self.dataset.labels
        labels = None if labels is None else labels[torch.tensor(reader.read)]
        batch = Batch(global_crops, local_crops, params, labels, index, reader.corrupt, reader.replaced, step)
        return batch if get_worker_info() is None else Packed.of(batch, self.key, slot)

    def _shrink(self, index: torch.Tensor, epoch: int):
        uniforms = self.multicrop.geometry(index, epoch)

        def shrink(place: int, height: int, width: int) -> int:
            return self.multicrop.shrink(self.multicrop.boxes(uniforms[place:place + 1], [(height, width)])[0][0])

        return shrink


def unchanged(item):
    """A collate function for items that are batches already."""
    return item

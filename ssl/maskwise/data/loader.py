"""Batches of a whole run; each is a pure function of (seed, step, world), whatever computes it."""

import os
import pickle
import signal
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from maskwise.data import decoders
from maskwise.data.batch import Batch
from maskwise.data.reader import Decoded, Reader, remembered
from maskwise.functional import draws
from maskwise.functional.errors import UserError

ALWAYS_FORGIVEN = 10


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in one pass over `count` images; what is left over waits for the next epoch's order."""
    return count // batch_size


def batches(dataset, multicrop, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
            start_step: int = 0, total_steps: int, workers: int = 0, pin_memory: bool = False,
            cache: str = "auto", corrupt_share: float = 0.05, decoder: str = "auto", jpeg_scaling: bool = False) -> "Batches":
    """Iterate over this rank's `Batch` of every step in [start_step, total_steps).

    batch_size is that of all ranks together: step s takes order(seed, epoch)[s*B : (s+1)*B] of its epoch and rank
    r the r-th part of it. One set of workers lives for the whole run. An unreadable image is replaced by the next
    readable one and reported; `corrupt_share` of the images seen (and ten in any case) is the limit.
    cache: "auto" keeps decoded images in memory where all processes together need less than 1 GiB, "none" never.
    decoder: of JPEGs (`decoders.NAMES`). jpeg_scaling: decode a JPEG at 1/2, 1/4 or 1/8 of its size where every view of
    it is still made smaller after that; nothing is kept in memory then.
    Raises UserError for a decoder that does not work here, for a batch that the data cannot fill or the ranks cannot share, and above the limit.
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
    dataset = Decoded(dataset, decoders.resolved(decoder))
    if cache == "auto" and not jpeg_scaling:
        dataset = remembered(dataset, processes=max(1, workers))
    steps = Steps(dataset, multicrop, batch_size, rank, world_size, seed, jpeg_scaling)
    return Batches(steps, range(start_step, total_steps), workers, pin_memory, corrupt_share)


class Batches:
    """Iterator over batches with an account of the files that could not be read.

    .corrupt: name -> reason of each; .seen: images asked for so far; .replaced: how many of them were replaced.
    """

    def __init__(self, steps: "Steps", order: range, workers: int, pin_memory: bool, corrupt_share: float):
        self.corrupt: dict[str, str] = {}
        self.seen = 0
        self.replaced = 0
        self._share = corrupt_share
        self._length = len(order)
        loader = DataLoader(steps, batch_size=None, sampler=order, num_workers=workers, collate_fn=unchanged,
                            pin_memory=pin_memory, worker_init_fn=quiet_worker, generator=torch.Generator())
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
            self._give_up(str(batch))
        self.seen += len(batch)
        self.replaced += batch.replaced
        self.corrupt.update(batch.corrupt)
        if self.replaced > max(ALWAYS_FORGIVEN, self._share * self.seen):
            name, reason = next(iter(self.corrupt.items()))
            self._give_up(f"{self.replaced} of {self.seen} images could not be read ({name}: {reason}), more than "
                          f"{self._share:.0%}; remove the damaged files or repair the data")
        return batch

    def _give_up(self, line: str):
        self.close()
        raise UserError(line)

    def close(self) -> None:
        """Let the workers go."""
        self._iterator = iter(())


class Steps(Dataset):
    """Step number -> this rank's Batch of that step; from a worker, Packed."""

    def __init__(self, dataset, multicrop, batch_size: int, rank: int, world_size: int, seed: int, jpeg_scaling: bool = False):
        self.dataset, self.multicrop, self.jpeg_scaling = dataset, multicrop, jpeg_scaling
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self._order = (None, None)

    def __getitem__(self, step: int) -> "Batch | Packed | UserError":
        epoch, place = divmod(step, steps_per_epoch(len(self.dataset), self.batch_size))
        if self._order[0] != epoch:
            self._order = (epoch, draws.order(self.seed, epoch, len(self.dataset)))
        share = self.batch_size // self.world_size
        first = place * self.batch_size + self.rank * share
        index = self._order[1][first:first + share].clone()
        reader = Reader(self.dataset, self._shrink(index, epoch) if self.jpeg_scaling else None)
        working = get_worker_info() is not None
        try:
            images = map(reader, range(share), index.tolist())
            global_crops, local_crops, params = self.multicrop.batch(images, index, epoch, shared if working else torch.empty)
        except UserError as error:  # handed over as a value: a worker's exception would arrive as a traceback
            return error
        labels = self.dataset.labels
        labels = None if labels is None else labels[torch.tensor(reader.read)]
        batch = Batch(global_crops, local_crops, params, labels, index, reader.corrupt, reader.replaced)
        return Packed.of(batch) if working else batch

    def _shrink(self, index: torch.Tensor, epoch: int):
        uniforms = self.multicrop.geometry(index, epoch)

        def shrink(place: int, height: int, width: int) -> int:
            return self.multicrop.shrink(self.multicrop.boxes(uniforms[place:place + 1], [(height, width)])[0][0])

        return shrink


@dataclass(frozen=True)
class Packed:
    """A Batch between processes: its crops lie in shared memory where they were written, its many small tensors are one string."""

    global_crops: torch.Tensor
    local_crops: torch.Tensor
    rest: bytes

    @classmethod
    def of(cls, batch: Batch) -> "Packed":
        """Pack a batch."""
        empty = torch.empty(0, dtype=torch.uint8)
        small = replace(batch, global_crops=empty, local_crops=empty).each(torch.Tensor.numpy)
        return cls(batch.global_crops, batch.local_crops, pickle.dumps(small, pickle.HIGHEST_PROTOCOL))

    def unpacked(self) -> Batch:
        """The batch; its crops are not copied."""
        small = pickle.loads(self.rest).each(lambda array: torch.from_numpy(np.array(array)))
        return replace(small, global_crops=self.global_crops, local_crops=self.local_crops)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self.unpacked().pin_memory()


def shared(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in memory that other processes can map."""
    count = int(np.prod(shape))
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(count * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def unchanged(item):
    """A collate function for items that are batches already."""
    return item


def quiet_worker(_: int) -> None:
    """Leave signals to the training process: it wants batches until the step boundary, and ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))

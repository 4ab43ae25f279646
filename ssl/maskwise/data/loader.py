"""Batches of a whole run; each is a pure function of (seed, step, world), whatever computes it."""

import os
import signal

import torch
from torch.utils.data import DataLoader, Dataset

from maskwise.data.batch import Batch
from maskwise.data.decode import CorruptImage
from maskwise.functional import draws
from maskwise.functional.errors import UserError

CACHE_BYTES = 1 << 30
ROW_OF_FAILURES = 100
ALWAYS_FORGIVEN = 10


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in one pass over `count` images; what is left over waits for the next epoch's order."""
    return count // batch_size


def batches(dataset, multicrop, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
            start_step: int = 0, total_steps: int, workers: int = 0, pin_memory: bool = False,
            cache: str = "auto", corrupt_share: float = 0.05) -> "Batches":
    """Iterate over this rank's `Batch` of every step in [start_step, total_steps).

    batch_size is that of all ranks together: step s takes order(seed, epoch)[s*B : (s+1)*B] of its epoch and rank
    r the r-th part of it. One set of workers lives for the whole run. An unreadable image is replaced by the next
    readable one and reported; `corrupt_share` of the images seen (and ten in any case) is the limit.
    cache: "auto" keeps decoded images in memory where all processes together need less than 1 GiB, "none" never.
    Raises UserError for a batch that the data cannot fill or the ranks cannot share, and above the limit.
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
    if cache == "auto":
        dataset = remembered(dataset, processes=max(1, workers))
    return Batches(Steps(dataset, multicrop, batch_size, rank, world_size, seed), range(start_step, total_steps),
                   workers, pin_memory, corrupt_share)


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
    """Step number -> this rank's Batch of that step."""

    def __init__(self, dataset, multicrop, batch_size: int, rank: int, world_size: int, seed: int):
        self.dataset, self.multicrop = dataset, multicrop
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self._order = (None, None)

    def __getitem__(self, step: int) -> Batch | UserError:
        epoch, place = divmod(step, steps_per_epoch(len(self.dataset), self.batch_size))
        if self._order[0] != epoch:
            self._order = (epoch, draws.order(self.seed, epoch, len(self.dataset)))
        share = self.batch_size // self.world_size
        first = place * self.batch_size + self.rank * share
        index = self._order[1][first:first + share].clone()
        reader = Reader(self.dataset)
        try:
            global_crops, local_crops, params = self.multicrop.batch(map(reader, index.tolist()), index, epoch)
        except UserError as error:  # handed over as a value: a worker's exception would arrive as a traceback
            return error
        labels = getattr(self.dataset, "labels", None)
        labels = None if labels is None else labels[torch.tensor(reader.read)]
        return Batch(global_crops, local_crops, params, labels, index, reader.corrupt, reader.replaced)


class Reader:
    """Images by index; one that cannot be read gives way to the next that can."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.read: list[int] = []
        self.corrupt: dict[str, str] = {}
        self.replaced = 0

    def __call__(self, index: int) -> torch.Tensor:
        for tried in range(ROW_OF_FAILURES):
            candidate = (index + tried) % len(self.dataset)
            try:
                image = self.dataset.image(candidate)
            except CorruptImage as error:
                self.corrupt[error.name] = error.reason
                continue
            self.read.append(candidate)
            self.replaced += tried > 0
            return image
        name, reason = next(iter(self.corrupt.items()))
        raise UserError(f"{ROW_OF_FAILURES} images in a row could not be read (first {name}: {reason}); "
                        "remove the damaged files or repair the data")


class Remembered:
    """A dataset that decodes each image once and keeps it."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.labels = getattr(dataset, "labels", None)
        self._images: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W]. Raises decode.CorruptImage."""
        image = self._images.get(index)
        if image is None:
            image = self._images[index] = self.dataset.image(index).contiguous()
        return image


def remembered(dataset, processes: int):
    """The dataset with a memory where `processes` copies of all its images fit into 1 GiB, judged by eight images."""
    sizes = []
    for k in range(min(8, len(dataset))):
        try:
            sizes.append(dataset.image(k * len(dataset) // min(8, len(dataset))).numel())
        except CorruptImage:
            continue
    if not sizes or processes * len(dataset) * sum(sizes) / len(sizes) > CACHE_BYTES:
        return dataset
    return Remembered(dataset)


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

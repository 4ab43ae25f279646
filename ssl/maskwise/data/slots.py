"""Shared memory that batches are written into by workers and read from in place, again and again."""

import itertools
import os
import pickle
import weakref
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from maskwise.data.batch import Batch
from maskwise.functional.errors import UserError

SHARED_FILES = "/dev/shm"


class Slots:
    """A few stretches of shared memory, each lent to one batch at a time and free again once no tensor lies in it.

    count stretches of `size` bytes. A stretch that is used again costs no page faults, of which fresh memory takes one every 4 KiB.
    Raises UserError where the system has not as much shared memory.
    """

    pools: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
    keys = itertools.count()

    def __init__(self, count: int, size: int):
        check_room(count * size)
        storages = [torch.UntypedStorage._new_shared(size) for _ in range(count)]  # as torch's own collation makes it: no page is touched yet
        self.buffers = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages]
        self.free = deque(range(count))
        self.key = next(self.keys)
        self.pools[self.key] = self

    def take(self) -> int | None:
        """The number of a free stretch; None where all are in use."""
        try:
            return self.free.popleft()
        except IndexError:
            return None

    def lend(self, number: int) -> torch.Tensor:
        """The bytes of a stretch, uint8 [size]; it is given back when the last tensor that shares their storage goes."""
        array = self.buffers[number].numpy()  # a new object each time, which the tensor keeps alive and which tells of its end
        weakref.finalize(array, self.free.append, number).atexit = False
        return torch.from_numpy(array)


def check_room(size: int) -> None:
    """Raises UserError where the shared memory of the system has less than `size` bytes left."""
    try:
        there = os.statvfs(SHARED_FILES)
    except (OSError, AttributeError):
        return
    left = there.f_bavail * there.f_frsize
    if size > left:
        raise UserError(f"the data workers need {size >> 20} MiB of shared memory and {SHARED_FILES} has {left >> 20}; "
                        f"give fewer speed.workers, a smaller batch, or the container more (docker: --shm-size={-(-size >> 30)}g)")


class Room:
    """Tensors laid one after another into the bytes of a stretch; called as torch.empty is."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer, self.used = buffer, 0

    def __call__(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        first, self.used = self.used, self.used + int(np.prod(shape))
        return self.buffer[first:self.used].view(shape)


@dataclass(frozen=True)
class Packed:
    """A Batch between processes: its crops lie in a slot (or in shared memory of their own), its small tensors are one string.

    key, slot: of the pool and of the stretch; shapes: of global and local crops in memory, channels last; crops: the two
    themselves where all slots were in use; rest: the pickled remainder.
    """

    key: int
    slot: int | None
    shapes: tuple
    crops: tuple | None
    rest: bytes

    @classmethod
    def of(cls, batch: Batch, key: int, slot: int | None) -> "Packed":
        """Pack a batch whose crops were written into a slot, or into memory that is copied into shared memory on the way."""
        empty = torch.empty(0, dtype=torch.uint8)
        small = replace(batch, global_crops=empty, local_crops=empty).each(torch.Tensor.numpy)
        crops = (batch.global_crops, batch.local_crops)
        shapes = tuple(tuple(each.permute(0, 2, 3, 1).shape) for each in crops)
        return cls(key, slot, shapes, crops if slot is None else None, pickle.dumps(small, pickle.HIGHEST_PROTOCOL))

    def unpacked(self) -> Batch:
        """The batch; its crops are not copied."""
        crops = self.crops
        if crops is None:
            room = Room(Slots.pools[self.key].lend(self.slot))
            crops = [room(*shape).permute(0, 3, 1, 2) for shape in self.shapes]
        small = pickle.loads(self.rest).each(lambda array: torch.from_numpy(np.array(array)))
        return replace(small, global_crops=crops[0], local_crops=crops[1])

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return self.unpacked().pin_memory()

"""Pass batches from the workers to the training process through reused shared-memory buffers."""

import itertools
import math
import os
import pickle
import weakref
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from maskwise.data.batch import Batch
from maskwise.errors import UserError

SHARED_FILES = "/dev/shm"


class BufferPool:
    """Pool `count` shared-memory buffers of `size` bytes; each is reused once the batch in it is garbage-collected.

    A reused buffer costs no page faults; fresh memory costs one every 4 KiB. Raises UserError where the system lacks
    the shared memory.
    """

    pools: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
    keys = itertools.count()

    def __init__(self, count: int, size: int):
        check_shared_memory(count * size)
        # Allocated as torch's collation does it: no page is touched yet.
        storages = [torch.UntypedStorage._new_shared(size) for _ in range(count)]
        self.buffers = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages]
        self.free = deque(range(count))
        self.key = next(self.keys)
        self.pools[self.key] = self

    def take(self) -> int | None:
        """Reserve a free buffer and return its number; None where all are in use."""
        try:
            return self.free.popleft()
        except IndexError:
            return None

    def acquire(self, number: int) -> torch.Tensor:
        """Return the bytes of a buffer, uint8 [size]; it is free again once the last tensor on it is gone."""
        # A new array object each time: the tensor holds it, and its finalizer releases the buffer.
        array = self.buffers[number].numpy()
        weakref.finalize(array, self.free.append, number).atexit = False
        return torch.from_numpy(array)


def check_shared_memory(size: int) -> None:
    """Raise UserError where the system has less than `size` bytes of shared memory left."""
    try:
        stats = os.statvfs(SHARED_FILES)
    except (OSError, AttributeError):
        return
    left = stats.f_bavail * stats.f_frsize
    if size > left:
        raise UserError(
            f"the data workers need {size >> 20} MiB of shared memory and {SHARED_FILES} has {left >> 20}; "
            f"give fewer speed.workers, a smaller batch, or the container more (docker: --shm-size={-(-size >> 30)}g)"
        )


class BufferAllocator:
    """Allocate tensors one after another in a buffer, with the call signature of torch.empty.

    A tensor that does not fit gets memory of its own, and `.overflowed` is set.
    """

    def __init__(self, buffer: torch.Tensor):
        self.buffer, self.used, self.overflowed = buffer, 0, False

    def __call__(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        start, end = self.used, self.used + math.prod(shape) * dtype.itemsize
        if end > len(self.buffer):
            self.overflowed = True
            return torch.empty(*shape, dtype=dtype)
        self.used = end
        return self.buffer[start:end].view(dtype).view(shape)


@dataclass(frozen=True)
class SharedBatch:
    """Represent a Batch between processes: crops in shared memory, everything else as one pickled string.

    key, buffer: pool and number of the buffer; shapes, dtype: of the global and local crops, channels last; crops: the
    crops themselves where they are in no buffer (buffer is None); rest: the pickled remainder.
    """

    key: int
    buffer: int | None
    shapes: tuple
    dtype: torch.dtype
    crops: tuple | None
    rest: bytes

    @classmethod
    def of(cls, batch: Batch, key: int, buffer: int | None) -> "SharedBatch":
        """Pack a batch whose crops lie in a pool's buffer, or in ordinary memory that pickling copies (buffer None)."""
        empty = torch.empty(0, dtype=torch.uint8)
        small = replace(batch, global_crops=empty, local_crops=empty).map_tensors(torch.Tensor.numpy)
        crops = (batch.global_crops, batch.local_crops)
        shapes = tuple(tuple(tensor.permute(0, 2, 3, 1).shape) for tensor in crops)
        rest = pickle.dumps(small, pickle.HIGHEST_PROTOCOL)
        return cls(key, buffer, shapes, batch.global_crops.dtype, crops if buffer is None else None, rest)

    def unpack(self) -> Batch:
        """Rebuild the batch without copying its crops."""
        crops = self.crops
        if crops is None:
            allocate = BufferAllocator(BufferPool.pools[self.key].acquire(self.buffer))
            crops = [allocate(*shape, dtype=self.dtype).permute(0, 3, 1, 2) for shape in self.shapes]
        small = pickle.loads(self.rest).map_tensors(lambda array: torch.from_numpy(np.array(array)))
        return replace(small, global_crops=crops[0], local_crops=crops[1])

    def pin_memory(self) -> Batch:
        """Rebuild the batch in page-locked memory."""
        return self.unpack().pin_memory()

"""`World`: who else is training, and what the ranks say to each other."""

import dataclasses
import datetime
import inspect
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.functional.errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks of one run; `World()` is a process alone on the CPU, without a process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, device: str = "auto") -> "World":
        """Read torchrun's environment and join its ranks (gloo for CPU tensors, nccl for CUDA ones).

        `device` is auto, cpu, cuda or cuda:N. Raises UserError for a device that this machine lacks or an environment
        that torchrun would not write.
        """
        try:
            size = int(os.environ.get("WORLD_SIZE", "1"))
            rank = int(os.environ.get("RANK", "0"))
            local = int(os.environ.get("LOCAL_RANK", rank))
        except ValueError as error:
            raise UserError(f"RANK, LOCAL_RANK and WORLD_SIZE must be integers ({error}): start with torchrun") from None
        chosen = _device(device, local, size)
        if size == 1:
            return cls(0, 1, chosen)
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(
                f"WORLD_SIZE is {size} but RANK, MASTER_ADDR or MASTER_PORT is not set: start with torchrun, or unset WORLD_SIZE"
            )
        backend = "gloo"
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=datetime.timedelta(minutes=30))
        return cls(rank, size, chosen)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, without gradient; alone, the tensor itself. The argument is not written to."""
        if self.size == 1:
            return tensor.detach()
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks in rank order: [n_r, ...] -> [sum of n_r, ...]; the n_r may differ."""
        if self.size == 1:
            return tensor.detach()
        rows = torch.zeros(self.size, dtype=torch.int64)
        rows[self.rank] = len(tensor)
        rows = self.all_sum(rows).tolist()
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, rows)])

    def gather_objects(self, value) -> list:
        """One small picklable value per rank, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on any rank; talks between hosts only and never waits for a GPU."""
        if self.size == 1:
            return bool(flag)
        return bool(self.all_sum(torch.tensor([int(flag)])).item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is called in training: itself when alone, else in DDP with synchronised batch norm.

        Raises UserError for batch norm on several CPU ranks, where no synchronised version exists.
        """
        if self.size == 1:
            return module
        if any(isinstance(part, _BatchNorm) for part in module.modules()):
            if self.device.type != "cuda":
                raise UserError(
                    f"batch norm cannot be synchronised between {self.size} CPU ranks: use one rank, GPUs, or a model without batch norm"
                )
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        # Without device_ids DDP leaves the inputs where they are: sample ids belong on the host.
        parallel = nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
        return parallel(module, find_unused_parameters=False, gradient_as_bucket_view=True, **{buffers: False})

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _device(name: str, local: int, size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local if device.index is None or size > 1 else device.index
        if index >= count:
            raise UserError(
                f"device cuda:{index} is asked for and this machine has {count} CUDA devices: use device=cpu, or no more ranks per machine than GPUs"
            )
        return torch.device("cuda", index)
    return device

"""`World`: who else is training, what the ranks say to each other, and what they do when one of them is lost."""

import contextlib
import dataclasses
import datetime
import inspect
import os
import socket
import threading
import time
import zlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.functional.errors import UserError

PATIENCE = 600.0  # seconds that ranks wait for each other unless MASKWISE_TIMEOUT says otherwise
_store = None  # where ranks that met leave words for each other; it outlives the process group


# Groups that are left, kept to the end: whoever lets go last (DDP's reducer) joins gloo's thread with the GIL in hand, and that thread
# may want the GIL for the tensors of its last sum. So the two waited for each other, now and then, after a run was over.
LEFT: list = []


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks of one run; `World()` is a process alone on the CPU, without a process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, device: str = "auto") -> "World":
        """Read torchrun's environment and join its ranks (gloo for CPU tensors, nccl for CUDA ones).

        `device` is auto, cpu, cuda or cuda:N. Ranks wait MASKWISE_TIMEOUT seconds (600) for each other, here and in all they do
        together. Raises UserError for a device that this machine lacks, an environment that torchrun would not write, and
        ranks that do not come.
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
        seconds = patience()
        try:
            global _store
            _store = next(rendezvous("env://", rank, size, timeout=datetime.timedelta(seconds=seconds)))[0]
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise UserError(f"not all of the {size} ranks came within {seconds:g} s: look at what the others say, and whether "
                            "every machine reaches the first one and runs the same command") from None  # fmt: skip
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
        module = self.synchronised(module)
        # Without device_ids DDP leaves the inputs where they are: sample ids belong on the host.
        parallel = nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
        return parallel(module, find_unused_parameters=False, gradient_as_bucket_view=True, **{buffers: False})

    def synchronised(self, module: nn.Module) -> nn.Module:
        """The module with the batch norms of several ranks made one; raises UserError for them on CPU ranks."""
        if not any(isinstance(part, _BatchNorm) for part in module.modules()):
            return module
        if self.device.type != "cuda":
            raise UserError(f"batch norm cannot be synchronised between {self.size} CPU ranks: use one rank, GPUs, or a model without batch norm")
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)

    def equalise(self, module: nn.Module) -> None:
        """Set parameters and buffers to those of rank 0."""
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)

    @contextlib.contextmanager
    def together(self):
        """What is done in here ends with a UserError when another rank is lost (ended, cut off or silent for too long); closes at the end."""
        failed = True
        try:
            yield self
            failed = False
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            raise UserError(
                f"a rank of {self.size} has ended, was cut off or did not answer for {patience():g} s, so all stop: look for what it said; "
                "the same command continues from the last checkpoint"
            ) from None
        finally:
            global _store
            _store = _store if failed else None  # nothing is left to be told; rank 0's store must not live on into the end of the interpreter
            if not (failed and self.device.type == "cuda"):  # NCCL would wait for what the others never join; the end of the process parts from them
                self.close()

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.size > 1 and dist.is_initialized():
            LEFT.append(dist.group.WORLD)
            dist.destroy_process_group()


def patience() -> float:
    """Seconds that ranks wait for each other; raises UserError where MASKWISE_TIMEOUT is no such number."""
    text = os.environ.get("MASKWISE_TIMEOUT", "")
    try:
        seconds = float(text or PATIENCE)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise UserError(f"MASKWISE_TIMEOUT={text} is no number of seconds above 0; ranks wait {PATIENCE:g} s for each other without it")
    return seconds


def voice(text: str, wait: float = 3.0) -> str | None:
    """How a rank tells a mistake: the text itself from rank 0, named after the rank from another, None where another rank has told the same.

    Ranks agree through the store at which they meet. Where there is none, each node's first rank tells it at once and others only
    when torchrun has not ended them after `wait` seconds.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    named = text if rank == "0" else f"rank {rank} on {socket.gethostname()}: {text}"
    if size == "1":
        return text if rank == "0" else None
    answers = []

    def ask():
        with contextlib.suppress(KeyError, ValueError, RuntimeError):
            told = f"maskwise/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{zlib.crc32(text.encode())}"
            answers.append((_store or _knock(wait)).add(told, 1))

    asking = threading.Thread(target=ask, daemon=True)  # a store behind a cut cable never answers, and counting has no timeout
    asking.start()
    asking.join(2 * wait)
    if answers:
        return named if answers == [1] else None
    if os.environ.get("LOCAL_RANK", rank) != "0":
        time.sleep(wait)
    return named


def _knock(wait: float) -> dist.Store:
    """The store of ranks that have not met, kept by torchrun, or by rank 0 where it waits for the others; raises RuntimeError."""
    if os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise RuntimeError("nobody keeps a store before rank 0 does")
    seconds = datetime.timedelta(seconds=wait)
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=seconds, wait_for_workers=False)


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error tells that another rank cannot be reached, rather than a mistake of this one."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer"))


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

"""The ranks of a run: process groups, collectives, and errors when a rank is lost."""

import contextlib
import dataclasses
import datetime
import inspect
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.distributed.environment import read_ranks
from maskwise.distributed.rendezvous import answers, taken
from maskwise.errors import UserError

TIMEOUT = 600.0  # seconds that ranks wait for each other unless MASKWISE_TIMEOUT is set
# Seconds without the interpreter's lock after the last collective. Gloo's threads need it to drop their last tensors;
# a thread that asks for it while the interpreter ends kills the process (process/ending.py).
RELEASE = 0.1
_store = None  # rendezvous store of the ranks, also used to report errors once; it outlives the process group

# Destroyed process groups are kept alive until exit: DDP's reducer joins the gloo thread while it holds the GIL, and
# that thread may need the GIL for the tensors of its last reduction, which can deadlock at shutdown.
_KEEP_ALIVE: list = []


def keep_alive(groups) -> None:
    """Keep process groups until the process exits."""
    _KEEP_ALIVE.extend(groups)


@dataclasses.dataclass(frozen=True)
class World:
    """Describe the ranks of one run; `World()` is a single process on the CPU without a process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, device: str = "auto") -> "World":
        """Read torchrun's environment and join its ranks (gloo for CPU tensors, NCCL for CUDA ones).

        device: auto, cpu, cuda or cuda:N. Ranks wait MASKWISE_TIMEOUT seconds (600) for each other, here and in every
        collective. Raises UserError for a device that this machine lacks, an environment that torchrun would not set,
        and ranks that do not join.
        """
        ranks = read_ranks()
        rank, size = ranks.rank, ranks.size
        chosen = _device(device, ranks.local, size)
        if size == 1:
            return cls(0, 1, chosen)
        backend = "gloo"
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            backend = "cpu:gloo,cuda:nccl"
        seconds = timeout()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if rank and answers(host, port, seconds) is False:  # torch would wait for another program without end
            raise UserError(taken(port, host))
        try:
            global _store
            _store = next(rendezvous("env://", rank, size, timeout=datetime.timedelta(seconds=seconds)))[0]
            dist.init_process_group(
                backend, store=_store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=seconds)
            )
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            if "address already in use" in str(error).lower():
                raise UserError(taken(port)) from None
            raise UserError(
                f"not all of the {size} ranks joined within {seconds:g} s: see the logs of the others, and check that "
                "every machine reaches the first one and runs the same command"
            ) from None
        return cls(rank, size, chosen)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks without gradient; the tensor itself on one rank. The argument is not modified."""
        if self.size == 1:
            return tensor.detach()
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the rows of all ranks in rank order: [n_r, ...] -> [sum of n_r, ...]; the n_r may differ."""
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
        """Gather one small picklable value per rank, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank; uses host tensors and never waits for a GPU."""
        if self.size == 1:
            return bool(flag)
        return bool(self.all_sum(torch.tensor([int(flag)])).item())

    def raise_together(self, problem: str = "") -> None:
        """Raise the same UserError on all ranks if there is a problem on any: that of the lowest rank."""
        problems = [text for text in self.gather_objects(problem) if text]
        if problems:
            raise UserError(problems[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap a module for training: unchanged on one rank, else in DDP with synchronized batch norm.

        Raises UserError for batch norm on several CPU ranks, where no synchronized version exists.
        """
        if self.size == 1:
            return module
        module = self.synchronize_batch_norm(module)
        # Without device_ids DDP leaves the inputs where they are: sample ids belong on the host.
        parallel = nn.parallel.DistributedDataParallel
        parameters = inspect.signature(parallel.__init__).parameters  # broadcast_buffers was renamed in torch 2.13
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        return parallel(module, find_unused_parameters=False, gradient_as_bucket_view=True, **{buffers: False})

    def synchronize_batch_norm(self, module: nn.Module) -> nn.Module:
        """Convert batch norms to SyncBatchNorm; raises UserError if there are any on CPU ranks."""
        if not any(isinstance(part, _BatchNorm) for part in module.modules()):
            return module
        if self.device.type != "cuda":
            raise UserError(
                f"batch norm cannot be synchronized between {self.size} CPU ranks: use one rank, GPUs, or a model "
                "without "
                "batch norm"
            )
        from timm.layers import convert_sync_batchnorm  # torch's drops the activation of timm's BatchNormAct2d

        return convert_sync_batchnorm(module)

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Copy parameters and buffers from rank 0."""
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)

    @contextlib.contextmanager
    def fail_together(self):
        """Raise UserError in the block if another rank is lost (ended, cut off or silent); close at the end."""
        failed = True
        try:
            yield self
            failed = False
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            raise UserError(
                f"a rank stopped responding ({timeout():g} s); see its own log above. All {self.size} ranks stop; the "
                "same "
                "command continues from the last checkpoint"
            ) from None
        finally:
            global _store
            if not failed:
                _store = None  # rank 0's store must not live on into the end of the interpreter
            # after a failure NCCL would wait for collectives that the others never join
            if failed and self.device.type != "cuda":
                self._leave()  # at once: the others' errors are counted while the store lives
            elif not failed:
                self.close()

    def close(self) -> None:
        """Leave the process group, if there is one, and let its threads drop their last tensors."""
        if self._leave():
            time.sleep(RELEASE)

    def _leave(self) -> bool:
        """Leave the process group; return whether there was one."""
        if self.size == 1 or not dist.is_initialized():
            return False
        keep_alive([dist.group.WORLD])
        dist.destroy_process_group()
        return True


def timeout() -> float:
    """Return the seconds that ranks wait for each other; raises UserError for an invalid MASKWISE_TIMEOUT."""
    text = os.environ.get("MASKWISE_TIMEOUT", "")
    try:
        seconds = float(text or TIMEOUT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise UserError(
            f"MASKWISE_TIMEOUT={text} is not a number of seconds above 0; without it ranks wait {TIMEOUT:g} s for each "
            "other"
        )
    return seconds


def report_once(text: str, wait: float = 3.0, ending: Callable[[], bool] = lambda: False) -> str | None:
    """Return the text that this rank should print for an error, None if another rank reports the same.

    Rank 0 prints the text itself, others with their rank and host. The ranks use the rendezvous store to deduplicate.
    Without a store the first rank of each node prints at once, and the others unless torchrun ends them within
    `wait` seconds, which `ending` tells. The signal must not interrupt this function: a rank that has counted itself
    first and ends without printing would leave the job without its error.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    named = text if rank == "0" else f"rank {rank} on {socket.gethostname()}: {text}"
    if size == "1":
        return text if rank == "0" else None
    counts = []

    def count():
        with contextlib.suppress(KeyError, ValueError, RuntimeError):
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store, key = _store or _connect_store(wait), f"maskwise/{restart}/{zlib.crc32(text.encode())}"
            counts.append(store.add(key, 1))
            hosts = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            until = time.monotonic() + wait
            while hosts and store.add(key, 0) < int(size) - 1 and time.monotonic() < until:  # it ends with this process
                time.sleep(0.05)

    # In a thread: a store behind a cut cable never answers, and `add` has no timeout.
    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    counting.join(2 * wait)
    if counts:
        return named if counts == [1] else None
    if os.environ.get("LOCAL_RANK", rank) != "0":
        until = time.monotonic() + wait
        while not ending() and time.monotonic() < until:
            time.sleep(0.05)
        return None if ending() else named
    return named


def _connect_store(wait: float) -> dist.Store:
    """Connect to the store of ranks that have not joined yet, hosted by torchrun or rank 0; raises RuntimeError."""
    if os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise RuntimeError("no store exists before rank 0 hosts it")
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=wait),
        wait_for_workers=False,
    )


def _is_loss(error: RuntimeError) -> bool:
    """Return whether an error means that another rank cannot be reached, rather than an error of this one."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _device(name: str, local: int, size: int) -> torch.device:
    """Resolve a device name for a local rank; raises UserError for one that this machine lacks."""
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
                f"device cuda:{index} is requested and this machine has {count} CUDA devices: use device=cpu, or no "
                "more "
                "ranks per machine than GPUs"
            )
        return torch.device("cuda", index)
    return device

"""Data worker processes: their signals and memory, and one line where the system has ended one."""

import os
import signal

from torch.utils.data import DataLoader

from maskwise.errors import UserError
from maskwise.process.malloc import keep_freed_memory

TORCH_HANDLER = "torch.utils.data._utils.signal_handling"  # module of the handler that raises in the midst of a step
SHARED_MEMORY = "the shared memory is full: give the container more (docker run --shm-size=8g), or lower speed.workers"
# signal -> likely cause and remedy
CAUSES = {
    "SIGKILL": "memory ran out: lower speed.workers, set speed.cache=none, or give the job more memory",
    "SIGBUS": SHARED_MEMORY,
    "SIGSEGV": "a decoder crashed: set data.decoder=pil, or find the image with speed.workers=0",
    "SIGABRT": "a decoder crashed: set data.decoder=pil, or find the image with speed.workers=0",
}


def start_worker(_: int) -> None:
    """Initialize a worker process; the `worker_init_fn` of the DataLoader."""
    ignore_signals()
    keep_freed_memory()


def ignore_signals() -> None:
    """Ignore signals: the training process needs batches until the step boundary, then ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


class Items:
    """Iterate over a DataLoader whose workers may be ended by the system: next then raises UserError in one line.

    torch's own handler would raise RuntimeError wherever the process happens to be; here a lost worker is noticed when
    its next item is due, within seconds.
    """

    def __init__(self, loader: DataLoader):
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        self.iterator = iter(loader)
        if is_from_torch(before):
            before = signal.SIG_DFL
        if before is not None and is_from_torch(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, before)

    def __iter__(self) -> "Items":
        return self

    def __next__(self):
        try:
            return next(self.iterator)
        except RuntimeError:
            lost = lost_worker(getattr(self.iterator, "_workers", ()))
            if lost is None:
                raise
            raise UserError(lost) from None


def is_from_torch(handler) -> bool:
    """Return whether a signal handler is the one that torch sets for its data workers."""
    return getattr(handler, "__module__", None) == TORCH_HANDLER


def lost_worker(workers) -> str | None:
    """Describe a worker process that has ended, with the likely cause and the remedy; None where all are alive."""
    dead = next((worker for worker in workers if not worker.is_alive()), None)
    if dead is None:
        return None
    code = dead.exitcode
    if code is None or code >= 0:
        return f"a data worker ended by itself (exit status {code}); find the reason with speed.workers=0"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    cause = f"; most likely {CAUSES[name]}" if name in CAUSES else "; find the reason with speed.workers=0"
    return f"a data worker was ended by {name}{cause}"

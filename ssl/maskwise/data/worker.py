"""What a data worker does when it starts."""

import ctypes
import os
import signal
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h


def start_worker(_: int) -> None:
    """Be quiet about signals, and keep the memory of one image for the next."""
    leave_signals_alone()
    keep_freed_memory()


def leave_signals_alone() -> None:
    """Leave signals to the training process: it wants batches until the step boundary, and ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: an image beyond 128 KiB is otherwise mapped anew, page by page, each time."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            library.mallopt(TRIM_THRESHOLD, 1 << 30)
            library.mallopt(MMAP_THRESHOLD, 1 << 30)

"""What a number was measured on, how fast that multiplies matrices, and how much memory a process has taken."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import torch

from maskwise import __version__

SIDE = 2048  # of the matrices whose product gives the matmul rate


def about(device: torch.device) -> dict:
    """The machine, the versions and the moment, for the head of a JSON file."""
    from maskwise.run_record import commit  # not by the contenders, whose memory is measured

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"), "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None, "platform": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(), "torch": torch.__version__,
        "maskwise": __version__, "commit": commit(),
    }  # fmt: skip


def processor() -> str:
    """The name of the CPU, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def wait(device: torch.device) -> None:
    """Let a GPU finish, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of the products of square matrices that fit into so many seconds."""
    side = SIDE if device.type == "cpu" else 4 * SIDE
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait(device)
        begin = time.perf_counter()
        torch.matmul(a, b, out=out)
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

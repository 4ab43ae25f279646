"""Name of the CPU, its matmul rate, and the peak memory of a process."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import torch

SIDE = 2048  # of the matrices whose product gives the matmul rate


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest product of square matrices within `seconds`."""
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
    """Peak memory of this process in bytes: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

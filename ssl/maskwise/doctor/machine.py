"""Describe the machine: device, precision, image decoders, memory."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

GIB = 1 << 30


def describe_machine(device: torch.device, precision: str, requested: str = "auto") -> list[tuple[str, str]]:
    """Facts about the machine as (name, value); requested: the recipe's train.precision."""
    import PIL
    from PIL import features

    jpeg = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    decoders = [f"Pillow {PIL.__version__} ({jpeg})", *(name for name in ("torchcodec", "torchvision") if usable(name))]
    name, memory = device_name(device), f"{free_memory(device) / GIB:.1f} GiB"
    if device.type == "cpu":
        name += f"; {torch.get_num_threads()} threads on {cores()} cores"
    else:
        memory += f" on the device, {free_memory(torch.device('cpu')) / GIB:.1f} GiB of host memory"
    return [
        ("device", name),
        ("precision", f"{precision} ({precision_reason(device, precision, requested)})"),
        ("decoders", ", ".join(decoders)),
        ("memory free", memory),
        ("torch", torch.__version__),
    ]


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the vector instructions of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def precision_reason(device: torch.device, precision: str, requested: str) -> str:
    """Why a precision is used: the recipe sets it, or the device is fast in it."""
    if requested != "auto":
        return "set by train.precision"
    return f"this {'device' if device.type == 'cuda' else 'CPU'} has {'' if precision == 'bf16' else 'no '}fast bf16"


def usable(package: str) -> bool:
    """Whether an image-decoding package is installed and its compiled part loads."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        if package == "torchvision":
            from maskwise.compat import ready_torchvision

            ready_torchvision()
            return hasattr(torch.ops.image, "decode_jpeg")
        importlib.import_module(package)
    except Exception:  # a compiled part that does not fit this torch raises nearly anything
        return False
    return True


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes of free memory on a device; for the CPU, within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * GIB
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # the page cache counts as available
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        free = int(lines.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text(encoding="utf-8").strip().isdigit():
        free = min(free, int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    return max(free, 0)


class Peak:
    """Peak memory since construction: of the device on a GPU, else of this process.

    Where the system cannot reset the counter, an earlier, larger peak of the process is returned.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            except OSError:
                pass

    @property
    def bytes(self) -> int:
        """Peak memory in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        status = Path("/proc/self/status")
        if status.is_file():
            for line in status.read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

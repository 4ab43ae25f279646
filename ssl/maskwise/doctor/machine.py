"""What the machine is: devices, precision, decoders, memory."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

GIB = 1 << 30


def machine(device: torch.device, precision: str) -> list[tuple[str, str]]:
    """Facts in words: (what, how much or which)."""
    import PIL
    from PIL import features

    jpeg = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    decoders = [f"Pillow {PIL.__version__} ({jpeg})", *(name for name in ("torchcodec", "torchvision") if usable(name))]
    threads = f"{torch.get_num_threads()} of {cores()} cores compute"
    return [
        ("device", f"{name_of(device)}; {threads}" if device.type == "cpu" else name_of(device)),
        ("precision", f"{precision} ({why(device, precision)})"),
        ("decoders", ", ".join(decoders)),
        ("memory free", f"{free_memory(device) / GIB:.1f} GiB" + ("" if device.type == "cpu" else f" on the device, {free_memory(torch.device('cpu')) / GIB:.1f} GiB beside it")),
        ("torch", torch.__version__),
    ]


def name_of(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def why(device: torch.device, precision: str) -> str:
    """What speaks for a precision on a device."""
    if device.type == "cuda":
        return "the device computes in bf16" if precision == "bf16" else "the device has no bf16 of its own, or the recipe asks for it"
    return "this CPU multiplies bf16" if precision == "bf16" else "this CPU has no fast bf16, or the recipe asks for it"


def usable(package: str) -> bool:
    """Whether a package that decodes images is installed and its compiled part loads."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        if package == "torchvision":
            from maskwise.functional.torchvision_ready import ready_torchvision

            ready_torchvision()
            return hasattr(torch.ops.image, "decode_jpeg")
        importlib.import_module(package)
    except Exception:  # a compiled part that does not fit this torch raises nearly anything
        return False
    return True


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the host's memory, also no more than the container's limit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * GIB
    about = Path("/proc/meminfo")
    if about.is_file():  # pages that only hold files may be had, too
        lines = dict(line.split(":") for line in about.read_text().splitlines() if ":" in line)
        free = int(lines.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


class Peak:
    """The most memory since it was made: of the device on a GPU, else of this process.

    Where the system cannot start a new count, a process that was larger before hides what is measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass

    @property
    def bytes(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        status = Path("/proc/self/status")
        if status.is_file():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""A CUDA device without a GPU: fake tensors in place of its memory, for tests of a CUDA build of torch.

No arithmetic happens. Operations on two devices raise as on a GPU, and whatever makes the host wait for the device is
listed: reads of values, and copies in either direction that are not asynchronous. The process must have been started
with the library of `runtime_library` in LD_PRELOAD: torch calls the CUDA runtime around every operation.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
VALUES = {torch.bool: True}  # that the host reads: of an integer 1, of a float 0.5
# convolutions ask cuDNN for a kernel: their shapes come from meta tensors
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
PROPERTIES = SimpleNamespace(
    name="fake", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30, warp_size=32
)
PRETENDED = {
    "_lazy_init": lambda: None,
    "is_initialized": lambda: False,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *device: None,
    "synchronize": lambda *device: None,
    "is_bf16_supported": lambda *arguments, **options: True,
    "is_current_stream_capturing": lambda: False,
    "get_device_capability": lambda *device: (9, 0),
    "get_device_properties": lambda *device: PROPERTIES,
    "get_device_name": lambda *device: "fake",
}


def missing() -> str | None:
    """Return what a fake GPU lacks here, None if nothing."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not sys.platform.startswith("linux"):
        return "LD_PRELOAD is for Linux"
    return None if shutil.which("cc") else "there is no C compiler"


def runtime_library(folder: Path) -> Path:
    """Compile the stand-in for CUDA's runtime into a folder; its name inside is the driver's."""
    library = folder / "fake_cuda_runtime.so"
    source = Path(__file__).with_suffix("").with_name("fake_cuda_runtime.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True)
    return library


class FakeGPU(TorchDispatchMode):
    """Run operations on fake CUDA tensors and real host tensors; `waits` lists (operation, place) of host waits."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and not any(isinstance(value, torch.device) and value.type == "cuda" for value in flat):
            return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            self._wait("read of a value")
            return VALUES.get(args[0].dtype, 0.5 if args[0].dtype.is_floating_point else 1)
        if function is aten._to_copy.default:
            target = kwargs.get("device")
            if on_device and target is not None and target.type == "cpu":
                self._wait("copy to the host")
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not on_device and not kwargs.get("non_blocking"):
                self._wait("blocking copy to the device")
        if function is aten.copy_.default and len({tensor.device.type for tensor in tensors}) > 1:
            if not on_device or not (len(args) > 2 and args[2]):
                self._wait("blocking copy between host and device")
            return args[0]
        args, kwargs = tree_map(self._known, (args, kwargs))
        if function in CONVOLUTIONS:
            return self._convolution(function, args, kwargs)
        with self.fake:
            return function(*args, **kwargs)

    def _known(self, value):
        """Return a host tensor as a fake one, so that the devices of all tensors are compared."""
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            value = self.fake.from_tensor(value.detach())
        if isinstance(value, FakeTensor):
            value.constant = None  # a small host tensor keeps its values otherwise
        return value

    def _convolution(self, function, args, kwargs):
        devices = {value.device for value in tree_flatten(args)[0] if isinstance(value, Tensor)}
        assert devices == {CUDA}, f"{function} on {devices}"
        out = function(*(to_meta(value) for value in args), **kwargs)
        return tree_map(lambda value: self.empty_like(value) if isinstance(value, Tensor) else value, out)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return a fake CUDA tensor of a tensor's shape, strides and type."""
        with self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)

    def _wait(self, kind: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/maskwise/" in f.filename or "/test_" in f.filename]
        self.waits.append((kind, " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames[::-1][:4])))


def to_meta(value):
    """Return a tensor's shape, strides and type on the meta device; other values unchanged."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeGPU]:
    """Pretend that there is one GPU, to which modules move by `.to` and tensors as usual."""
    gpu = FakeGPU()
    moved: dict[Tensor, Tensor] = {}  # shared tensors stay shared

    def module_to(module: nn.Module, *arguments, **options) -> nn.Module:
        device = torch._C._nn._parse_to(*arguments, **options)[0]
        if device is None or device.type != "cuda":
            return REAL_TO(module, *arguments, **options)
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and not isinstance(tensor, FakeTensor):
                        if tensor not in moved:
                            fake = gpu.empty_like(tensor)
                            is_parameter = isinstance(tensor, nn.Parameter)
                            moved[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                        table[name] = moved[tensor]
        return module

    with contextlib.ExitStack() as stack:
        for name, function in PRETENDED.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(nn.Module, "to", module_to))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *device: tensor))
        # torch's own chooses a kernel by the driver's answer
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", plain_attention))
        # tensors from lists are made on the host and then copied, where the mode sees it
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(gpu)
        yield gpu


REAL_TO = nn.Module.to


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Attend by matrix products, with a bias added to the logits."""
    logits = (q @ k.transpose(-2, -1)) * (scale or q.shape[-1] ** -0.5)
    return (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1) @ v

"""Time named parts of a step; count its floating-point operations and host reads."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from maskwise.bench.machine import wait


class Clock:
    """Seconds by part; nested parts are not counted in the outer one."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.stack = device, defaultdict(float), []

    @contextlib.contextmanager
    def part(self, name: str):
        """Add the time of the block to a part."""
        self._turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self.stack.pop()

    def _turn(self) -> None:
        wait(self.device)
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def around(self, *places: tuple[object, str, str]):
        """Time calls of (object, attribute name, part) within the block."""
        originals = []
        for owner, name, part in places:
            original = getattr(owner, name)
            originals.append((owner, name, original, name in vars(owner)))
            setattr(owner, name, self._timed(original, part))
        try:
            yield self
        finally:
            for owner, name, original, own in reversed(originals):
                setattr(owner, name, original) if own else delattr(owner, name)

    def _timed(self, call, part: str):
        def timed(*arguments, **options):
            with self.part(part):
                return call(*arguments, **options)

        return timed


class HostReads(TorchDispatchMode):
    """Count reads of tensor values by the host; on a GPU each one waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def _attention(q, k, *_, **__) -> int:
    """Operations of fused CPU attention, which torch's counter lacks: two products of T x T x d."""
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


def _attention_backward(grad, q, k, *_, **__) -> int:
    return _attention(q, k) * 5 // 2  # the first product again, then four


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count(call) -> dict[str, int]:
    """Count floating-point operations of matrix products and convolutions, and host reads, of one call."""
    with HostReads() as reads, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as products:
        call()
    return {"flops": products.get_total_flops(), "host_reads": reads.count}

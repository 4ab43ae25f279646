"""Where the time of a step goes: a clock around named parts, and counts of products and of the host's looks at tensors."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from maskwise.bench.machine import wait


class Clock:
    """Seconds by part; a part inside another does not count for the outer one."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.stack = device, defaultdict(float), []

    @contextlib.contextmanager
    def part(self, name: str):
        """Count the time spent inside for this part."""
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
        """Count calls of attribute `name` of an object as a part, for (object, name, part) each, while entered."""
        former = []
        for owner, name, part in places:
            original = getattr(owner, name)
            former.append((owner, name, original, name in vars(owner)))
            setattr(owner, name, self._timed(original, part))
        try:
            yield self
        finally:
            for owner, name, original, own in reversed(former):
                setattr(owner, name, original) if own else delattr(owner, name)

    def _timed(self, call, part: str):
        def timed(*arguments, **options):
            with self.part(part):
                return call(*arguments, **options)

        return timed


class HostReads(TorchDispatchMode):
    """Counts how often the host asks a tensor for its value; on a GPU each of them waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def _attention(q, k, *_, **__) -> int:
    """Operations of fused attention on a CPU, which torch's counter does not know: two products of T x T x d."""
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


def _attention_backward(slope, q, k, *_, **__) -> int:
    return _attention(q, k) * 5 // 2  # the first product again, then four


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count(call) -> dict[str, int]:
    """Floating-point operations of matrix products and convolutions, and host reads, of one call."""
    with HostReads() as reads, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as products:
        call()
    return {"flops": products.get_total_flops(), "host_reads": reads.count}

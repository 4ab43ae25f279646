"""Count the collectives that a process calls, DDP's buckets included."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.reproduce.growth.traffic import Traffic, summed

# function on the stack: purpose; the innermost one that is found here decides
PURPOSES = {
    "accumulate_centers": "centers",
    "sinkhorn": "Sinkhorn-Knopp",
    "gather_features": "KoLeo",
    "share_patch_targets": "number of patches",
    "_nonfinite_counts": "non-finite steps",
    "_norms": "gradient norms",
    "_engine_run_backward": "gradients",
    "step_metrics": "logged numbers",
    "fit": "stop signal",
}
OTHER = "other"
# operator: kind, position of the tensors that are the payload
OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
}


class CollectiveCounter(TorchDispatchMode):
    """Record every collective called in the block, from Python or from DDP's reducer: it passes torch's dispatcher.

    `calls` holds (purpose, kind, ranks, payload bytes) in order; an operator outside OPERATORS has its own name as
    kind and all its tensors as payload.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Record and run an operator."""
        if func.namespace == "c10d":
            name = func._opname
            kind, position = OPERATORS.get(name, (name, None))
            payload = args if position is None else args[position]
            self.calls.append(
                (purpose(kind), kind, group_size(args), sum(tensor.nbytes for tensor in tensors(payload)))
            )
        return func(*args, **(kwargs or {}))

    def traffic(self) -> Traffic:
        """Return the calls summed by purpose, kind and ranks."""
        return summed(self.calls)


def purpose(kind: str) -> str:
    """Return the purpose of the collective that is being called."""
    if kind == "all_gather":
        return "weights"
    if kind == "reduce_scatter":
        return "gradients"
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in PURPOSES:
            return PURPOSES[frame.f_code.co_name]
        frame = frame.f_back
    return OTHER


def group_size(args) -> int:
    """Return the number of ranks of the process group among an operator's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument).size()
    return 0


def tensors(value):
    """Yield the tensors in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)

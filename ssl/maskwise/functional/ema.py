"""Exponential moving average of the student's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: float, ok: Tensor | None = None
) -> None:
    """Move each teacher tensor in place, teacher <- momentum teacher + (1 - momentum) student, matched by name.

    Nothing moves where `ok`, a 0-dim bool tensor, is False, without a host sync; the student is finite either way.
    Raises ValueError if the names differ, the student's mask token excepted.
    """
    differing = sorted(
        str(name) for name in teacher.keys() ^ student.keys() if name in teacher or "mask_token" not in str(name)
    )
    if differing:
        raise ValueError(f"teacher and student differ in {len(differing)} tensors, {differing[0]} among them")
    if not teacher:
        return
    old = [_local(tensor) for tensor in teacher.values()]
    new = [_local(student[name].detach()) for name in teacher]
    if ok is None or ok.device.type == "cpu" and old[0].device.type == "cpu":
        if ok is None or ok:  # reading it is no sync on the CPU
            torch._foreach_lerp_(old, new, 1.0 - momentum)
        return
    steps = torch._foreach_sub(new, old)
    weight = (1.0 - momentum) * ok.to(old[0].device, torch.float64)
    torch._foreach_mul_(steps, weight.to(old[0].dtype))
    torch._foreach_add_(old, steps)


@torch.no_grad()
def average_(teacher: nn.Module, student: nn.Module, momentum: float, ok: Tensor | None = None) -> None:
    """Move a network's weights and running statistics in place as `ema_` does; counters of batch norms are copied."""
    old, new = ({**dict(network.named_parameters()), **dict(network.named_buffers())} for network in (teacher, student))
    averaged = [name for name, value in old.items() if value.is_floating_point()]
    ema_({name: old[name] for name in averaged}, {name: new[name] for name in averaged}, momentum, ok)
    for name in old.keys() - set(averaged):
        old[name].copy_(new[name] if ok is None else torch.where(ok, new[name], old[name]))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, which share its memory; other tensors unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

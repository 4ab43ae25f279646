"""The moving average that makes a teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def ema_(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: float, ok: Tensor | None = None) -> None:
    """Move each teacher tensor in place, teacher <- momentum teacher + (1 - momentum) student, matched by name.

    With `ok`, a 0-dim bool tensor, nothing moves where it is False, and the host reads nothing; the student is finite
    either way. Raises ValueError unless the names agree, the student's mask token excepted (attmask.md 1.6).
    """
    differing = sorted(str(name) for name in teacher.keys() ^ student.keys() if name in teacher or "mask_token" not in str(name))
    if differing:
        raise ValueError(f"teacher and student differ in {len(differing)} tensors, {differing[0]} among them")
    if not teacher:
        return
    kept = [_own(tensor) for tensor in teacher.values()]
    new = [_own(student[name].detach()) for name in teacher]
    if ok is None or ok.device.type == "cpu" and kept[0].device.type == "cpu":
        if ok is None or ok:  # on the host it costs nothing to look
            torch._foreach_lerp_(kept, new, 1.0 - momentum)
        return
    steps = torch._foreach_sub(new, kept)
    weight = (1.0 - momentum) * ok.to(kept[0].device, torch.float64)
    torch._foreach_mul_(steps, weight.to(kept[0].dtype))
    torch._foreach_add_(kept, steps)


def _own(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds, where it is split over several; they share its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

"""Running centers of the teacher's logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional import targets

# names of the centers in state dicts, and so in every checkpoint
STATE_NAMES = {"centers.cls": "center", "centers.patch": "patch_center"}


class Centers(nn.Module):
    """Centers of the teacher's logits for whole crops and for patches (DINO, eq. 4).

    Batch means of a step are accumulated, and move the centers once the step is done: the loss of a step uses the
    centers from before it.
    """

    def __init__(self, prototypes: int, patch_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("cls", torch.zeros(prototypes))
        self.register_buffer("patch", torch.zeros(patch_prototypes))
        self._step: int | None = None
        self._count = 0
        self._sums: list[Tensor] = []

    def accumulate(self, step: int, mean_logits: list[Tensor]) -> None:
        """Add the mean logits of a micro-batch, [K] for crops and perhaps [K'] for patches; a new step starts over."""
        if self._step != step:
            self._step, self._count, self._sums = step, 1, mean_logits
        else:
            self._count += 1
            self._sums = [total + new for total, new in zip(self._sums, mean_logits)]

    def shift(self) -> Tensor:
        """Return the distance of the accumulated means from the centers; not finite if a mean is not."""
        if not self._sums:
            return torch.zeros((), device=self.cls.device)
        shifts = [total / self._count - center for total, center in zip(self._sums, (self.cls, self.patch))]
        return torch.stack([torch.linalg.vector_norm(shift) for shift in shifts]).norm()

    def discard(self) -> None:
        """Drop the accumulated means."""
        self._step, self._count, self._sums = None, 0, []

    def update(self, ok: Tensor | None = None) -> None:
        """Move the centers towards the accumulated means where the 0-dim bool `ok` holds, without a host sync."""
        for center, total in zip((self.cls, self.patch), self._sums):
            moved = targets.update_center(center, (total / self._count).to(center.dtype), self.momentum)
            center.copy_(moved if ok is None else torch.where(ok, moved, center))
        self.discard()


def use_state_names(method: nn.Module) -> None:
    """Make a method with `centers` save and load them under their names in checkpoints."""
    method.register_state_dict_post_hook(_to_state_names)
    method.register_load_state_dict_pre_hook(_from_state_names)


def _to_state_names(method: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for ours, saved in STATE_NAMES.items():
        state[prefix + saved] = state.pop(prefix + ours)


def _from_state_names(method: nn.Module, state: dict, prefix: str, *details) -> None:
    for ours, saved in STATE_NAMES.items():
        if prefix + saved in state:
            state[prefix + ours] = state.pop(prefix + saved)
